"""Spans of time: what each rank did and when, one record per pass, collective, optimizer step and wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Category = Literal["pass", "comm", "optimizer", "wait", "data", "plan", "checkpoint"]


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that took time on one rank."""

    name: str
    category: Category
    start_ns: int
    """time.time_ns() at the start."""
    duration_ns: int
    step: int
    bytes_sent: int = 0


@dataclass(slots=True)
class Recorder:
    """Keeps the spans of one rank; beyond `limit` it only counts, so that long runs don't grow without end."""

    limit: int = 100_000
    step: int = 0
    spans: list[Span] = field(default_factory=list)
    dropped: int = 0
    comm_ns: int = 0
    """Nanoseconds spent waiting for exchanges since the last `take_comm_seconds`."""
    sent_bytes: int = 0
    """All that this rank has sent in exchanges and gradient sums."""
    exchanged_bytes: int = 0
    """Of these, what passes exchanged."""

    @contextmanager
    def span(self, name: str, category: Category) -> Iterator[None]:
        """Records the block, also when it raises."""
        start, clock = time.time_ns(), time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, category, start, time.perf_counter_ns() - clock)

    def add(self, name: str, category: Category, start_ns: int, duration_ns: int, bytes_sent: int = 0) -> None:
        """Records a span that was timed elsewhere."""
        self.sent_bytes += bytes_sent
        if len(self.spans) >= self.limit:
            self.dropped += 1
            return
        self.spans.append(Span(name, category, start_ns, duration_ns, self.step, bytes_sent))

    def take_comm_seconds(self) -> float:
        """Returns the seconds spent in exchanges since the last call."""
        seconds, self.comm_ns = self.comm_ns / 1e9, 0
        return seconds
