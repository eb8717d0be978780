"""Corrects a cost model by what passes took: speeds of ranks, attention against all else, compute of split passes.

Of every pass and rank, y = ln(computing seconds / predicted) is explained as

    y = s_r + m + m_k + g * q

s_r: slowness of rank r; m: of split passes, m_k: of their method (both 0 for passes of one rank); g: growth of
attention's cost against all else, q: attention's share of what was predicted. Coefficients that minimise the squares
weighed by age and duration plus (noise / prior)^2 each, where residuals above the noise count by their size only
(Huber, Robust Estimation of a Location Parameter, 1964): one pass that something disturbed moves nothing far.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from heteromesh.planner.cost.passes import Costs, load_of
from heteromesh.planner.plan import Step

REMEMBERED = 12
"""Steps."""
FADING = 0.85
"""Weight of a step relative to the one after it."""
NOISE = 0.1
"""Of ln(seconds) of one pass; the priors below are deviations of the coefficients before anything is seen."""
RANK_PRIOR, SPLIT_PRIOR, METHOD_PRIOR, ATTENTION_PRIOR = 0.25, 0.2, 0.1, 0.3
ROUNDS = 20
FURTHEST = 3.0
"""Of ln(slowness): beyond a factor of 20 it isn't a speed that is wrong."""
ALIKE = 0.93
"""Ranks at least this fast, relative to the fastest, count as equal: then shards are even."""
WORK = 0.95, 2.0
"""Parts of a sequence hardly compute faster than the whole."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What steps have shown beyond the measurement before them, as factors on its seconds."""

    slowness: tuple[float, ...] = ()
    """Per rank; empty: as measured."""
    attention: float = 1.0
    """Of attention relative to all else."""
    work: Mapping[str, float] = field(default_factory=dict)
    """By method, of split passes."""
    seconds_per_step: float = 0.0
    """Not a factor: what a step takes beyond its passes."""

    def applied(self, costs: Costs) -> Costs:
        """The corrected cost model."""
        costs = replace(costs, seconds_per_step=self.seconds_per_step)
        if not self.slowness:
            return costs
        speeds = [v / slow for v, slow in zip(costs.speeds, self.slowness, strict=True)]
        top = max(speeds)
        low, high = WORK
        return replace(
            costs,
            seconds_per_token2=costs.seconds_per_token2 * self.attention / top,
            seconds_per_token=costs.seconds_per_token / top,
            seconds_per_pass=costs.seconds_per_pass / top,
            speeds=tuple(1.0 if v >= ALIKE * top else max(0.01, round(v / top, 2)) for v in speeds),
            methods=tuple(
                replace(m, work=min(high, max(low, m.work * self.work.get(m.name, 1.0)))) for m in costs.methods
            ),
        )


class _Pass(NamedTuple):
    """A rank's part in a pass."""

    rank: int
    method: int
    """-1: on one rank."""
    share: float
    """Of attention in what was predicted."""
    seconds: float
    """Without waiting."""
    slower: float
    """ln(seconds / predicted)."""


class Learner:
    """Collects what the passes of late steps took. `waits_known`: whether seconds waited for peers are told apart."""

    def __init__(self, costs: Costs, *, waits_known: bool = True) -> None:
        self._costs, self._waits_known = costs, waits_known
        self._names = [m.name for m in costs.methods]
        self._steps: deque[list[_Pass]] = deque(maxlen=REMEMBERED)

    def add(self, step: Step, seconds: Mapping[tuple[int, int], float], waits: Mapping[tuple[int, int], float]) -> None:
        """What a step's passes took, and of that waited for peers, by (rank, position in the step)."""
        found = []
        for position, plan in enumerate(step.passes):
            split = len(plan.ranks) > 1
            method = self._costs.method(plan.method) if split else None
            # a plan file may have methods that the costs don't know
            if plan.offload or (split and (method is None or not self._waits_known)):
                continue
            load = load_of([step.batch[k] for k in plan.sequences], plan.shards)
            fixed = self._costs.priced(plan.ranks, method, load).fixed
            for rank, (attention, rest) in zip(
                plan.ranks, self._costs.computing(plan.ranks, method, load), strict=True
            ):
                took, predicted = seconds[rank, position] - waits[rank, position], attention + rest + fixed
                if took > 0 and predicted > 0:
                    kind = self._names.index(plan.method) if split else -1
                    found.append(_Pass(rank, kind, attention / predicted, took, math.log(took / predicted)))
        self._steps.append(found)

    def correction(self, seconds_per_step: float) -> Correction:
        """As of now."""
        passes = [p for found in self._steps for p in found]
        if not passes:
            return Correction(seconds_per_step=seconds_per_step)
        ranks, methods, share, seconds, slower = (np.array(column) for column in zip(*passes, strict=True))
        ages = np.repeat(np.arange(len(self._steps))[::-1], [len(found) for found in self._steps])
        weights = FADING**ages * np.minimum(1.0, seconds / seconds.mean())
        split = methods[:, None] == np.arange(len(self._names))
        columns = np.column_stack([share, methods >= 0, split]).astype(float)
        priors = [ATTENTION_PRIOR, SPLIT_PRIOR] + [METHOD_PRIOR] * len(self._names)
        slowness, rest = _fit(ranks, columns, slower, weights, self._costs.ranks, priors)
        return Correction(
            slowness=tuple(np.exp(np.clip(slowness, -FURTHEST, FURTHEST)).round(4).tolist()),
            attention=round(math.exp(rest[0]), 4),
            work={name: round(math.exp(rest[1] + own), 4) for name, own in zip(self._names, rest[2:], strict=True)},
            seconds_per_step=seconds_per_step,
        )


def _fit(
    ranks: np.ndarray[Any, np.dtype[np.int64]],
    columns: Array,
    values: Array,
    weights: Array,
    world: int,
    priors: Sequence[float],
) -> tuple[Array, Array]:
    """Coefficients of the ranks (world,) and of `columns` (k,), one after the other until both stand."""
    ridge = (NOISE / np.array(priors)) ** 2
    slowness, rest = np.zeros(world), np.zeros(columns.shape[1])
    for _ in range(ROUNDS):
        off = np.abs(values - slowness[ranks] - columns @ rest)
        trusted = weights * np.minimum(1.0, NOISE / np.maximum(off, 1e-12))
        sums = np.bincount(ranks, trusted * (values - columns @ rest), world)
        slowness = sums / (np.bincount(ranks, trusted, world) + (NOISE / RANK_PRIOR) ** 2)
        weighed = columns * trusted[:, None]
        rest = np.linalg.solve(columns.T @ weighed + np.diag(ridge), weighed.T @ (values - slowness[ranks]))
    return slowness, rest
