"""What is slower than its own kind, named in a sentence each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SLOW = 0.8
"""Of the median of its class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One measured rate of one thing."""

    subject: str
    """"rank 3 on b0"."""
    verb: str
    """"multiplies matrices at"."""
    kind: str
    """Its class; only equal classes and verbs are compared."""
    value: float
    unit: str


def outliers(readings: Sequence[Reading]) -> tuple[str, ...]:
    """Returns a sentence for every reading below `SLOW` of the median of its class; classes of one have no outliers."""
    classes: dict[tuple[str, str, str], list[float]] = {}
    for r in readings:
        classes.setdefault((r.kind, r.verb, r.unit), []).append(r.value)
    medians = {key: statistics.median(values) for key, values in classes.items() if len(values) > 1}
    sentences = []
    for r in readings:
        median = medians.get((r.kind, r.verb, r.unit))
        if median is not None and r.value < SLOW * median:
            sentences.append(
                f"{r.subject} {r.verb} {r.value:.3g} {r.unit}, {r.value / median:.2f} of the {median:.3g} {r.unit} "
                f"that is the median of {r.kind}"
            )
    return tuple(sentences)
