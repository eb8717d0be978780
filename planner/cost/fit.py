"""Constants and speeds from measured passes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIKE = 0.9
"""A short measurement can't tell a rank this fast from the fastest."""
SLOWEST = 0.05
ROUNDS = 20

Array = np.ndarray[Any, np.dtype[np.float64]]


def fit_jointly(
    rows: Sequence[Array], seconds: Sequence[Sequence[float]], most: float = math.inf
) -> tuple[Array, tuple[float, ...]]:
    """Returns (coefficients (k,), speed of each rank relative to the fastest), so that rows @ coefficients / speed =
    seconds.

    rows[r] (n, k) and seconds[r] (n,): of rank r, which need not have measured the same passes as others: what only a
    fast rank had the time for tells of all of them. most: see `fit_nonnegative`.
    """
    speeds: tuple[float, ...] = (1.0,) * len(rows)
    for _ in range(ROUNDS):
        coefficients = _of_reference(rows, seconds, speeds, most)
        ratios = [statistics.median((row @ coefficients) / took) for row, took in zip(rows, seconds, strict=True)]
        speeds = tuple(v / max(ratios) for v in ratios)
    speeds = tuple(_rounded(v) for v in speeds)
    return _of_reference(rows, seconds, speeds, most), speeds


def _of_reference(
    rows: Sequence[Array], seconds: Sequence[Sequence[float]], speeds: Sequence[float], most: float
) -> Array:
    scaled = [np.array(took) * v for took, v in zip(seconds, speeds, strict=True)]
    return fit_nonnegative(np.concatenate(rows), np.concatenate(scaled), most)


def fit_nonnegative(rows: Array, seconds: Array, most: float = math.inf) -> Array:
    """Fits by least squares of relative errors, with non-negative coefficients; rows (n, k), seconds (n,) -> (k,).

    Tries every set of non-zero coefficients (k is 2 or 3), so the answer is the exact optimum. most: that the first
    may be times the second.
    """
    found = _fit_nonnegative(rows, seconds)
    if not found[0] > most * found[1]:
        return found
    # the optimum is where the first is as much as it may be
    second, *others = _fit_nonnegative(np.column_stack((most * rows[:, 0] + rows[:, 1], rows[:, 2:])), seconds)
    return np.array([most * second, second, *others])


def _fit_nonnegative(rows: Array, seconds: Array) -> Array:
    scaled = rows / np.maximum(seconds, 1e-9)[:, None]
    best, best_error = np.zeros(rows.shape[1]), np.inf
    for mask in range(1, 2 ** rows.shape[1]):
        chosen = [i for i in range(rows.shape[1]) if mask >> i & 1]
        solution = np.linalg.lstsq(scaled[:, chosen], np.ones(len(seconds)), rcond=None)[0]
        error = float(((scaled[:, chosen] @ solution - 1.0) ** 2).sum())
        if (solution >= 0).all() and error < best_error:
            best, best_error = np.zeros(rows.shape[1]), error
            best[chosen] = solution
    return best


def relative(fastest: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns the speed relative to the fastest rank, from the same passes on both."""
    return _rounded(statistics.median(f / s for f, s in zip(fastest, seconds, strict=True)))


def _rounded(speed: float) -> float:
    return 1.0 if speed > ALIKE else max(SLOWEST, round(speed, 2))
