"""Start-up time and rate of a link from timed messages: seconds = alpha + bytes / rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STRAIGHT = 0.9
"""r2 below which no line goes through the times: a slope would be chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaBeta:
    """A fitted link."""

    alpha: float
    """Seconds that a message takes whatever its size; may be slightly below zero where a link lets bursts through."""
    bytes_per_second: float
    r2: float
    """Share of the weighted variance that the line explains; 1 is a perfect fit."""


def fit_alpha_beta(sizes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """Least squares of relative errors over messages of these bytes and seconds.

    Where times do not grow with sizes, or not in a line (noise, or one size only), the largest message alone gives
    the rate. Raises ValueError without a message of at least a byte.
    """
    x, y = np.asarray(sizes, dtype=float), np.maximum(np.asarray(seconds, dtype=float), 1e-9)
    if not len(x) or x.max() < 1:
        raise ValueError("a rate needs at least one message that is not empty")
    weights = 1 / y
    slope = alpha = r2 = 0.0
    if len(set(x)) > 1:
        slope, alpha = np.polyfit(x, y, 1, w=weights)
        mean = float(np.average(y, weights=weights**2))
        left = float(((weights * (y - alpha - slope * x)) ** 2).sum())
        whole = float(((weights * (y - mean)) ** 2).sum())
        r2 = 1 - left / whole if whole and slope > 0 else 0.0
    if r2 < STRAIGHT:
        last = int(x.argmax())
        return AlphaBeta(alpha=0.0, bytes_per_second=float(x[last] / y[last]), r2=r2)
    return AlphaBeta(alpha=float(alpha), bytes_per_second=float(1 / slope), r2=r2)
