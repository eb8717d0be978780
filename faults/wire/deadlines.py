"""Adaptive deadlines: how long a peer may be silent, learnt from how it has behaved."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Everything that is measured in seconds."""

    heartbeat: float = 0.05
    """Between two signs of life of a member."""
    silence: float = 0.5
    """Floor of the deadline on signs of life: a stopped or unreachable process is evicted after it."""
    hang: float = 2.0
    """Floor of the deadline on signs of life of the coordinator: one that is stopped or hangs is replaced after it."""
    stuck: float = 5.0
    """Floor of the deadline on progress of a main thread for which others wait."""
    ceiling: float = 60.0
    """No deadline grows beyond this."""
    deviations: float = 8.0
    """k of median + k MAD."""
    verdict: float = 0.01
    """How long a reported connection failure may wait for better evidence (the peer's death)."""
    gather: float = 0.0
    """How long the first epoch waits for more members when the minimum is there."""
    patience: float = 60.0
    """How long a job with fewer members than its minimum waits for others."""
    leave: float = 5.0
    """How long a connection may take to prove itself or to end."""


class Intervals:
    """The last gaps between a peer's signs of life (hivemind #676: median + k MAD instead of a guessed time limit)."""

    def __init__(self, floor: float, timing: Timing, keep: int = 64) -> None:
        self._floor, self._timing = floor, timing
        self._gaps: deque[float] = deque(maxlen=keep)

    def add(self, gap: float) -> None:
        self._gaps.append(gap)

    def deadline(self) -> float:
        """Seconds of silence that are still normal for this peer."""
        if len(self._gaps) < 8:
            return self._floor
        middle = statistics.median(self._gaps)
        spread = statistics.median(abs(gap - middle) for gap in self._gaps) * _TO_SIGMA
        return min(max(self._floor, middle + self._timing.deviations * spread), self._timing.ceiling)
