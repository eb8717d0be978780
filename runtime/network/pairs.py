"""Two ranks measure the link between them: latency by small messages to and fro, rates from growing ones.

Messages go through comm.exchange, as those of training do, so that what is measured is what training gets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.comm.world import World
from heteromesh.runtime.network.fit import AlphaBeta, fit_alpha_beta

Way = Literal["forward", "backward", "both"]
"""Lower rank to higher, the reverse, or both at once."""
WAYS: tuple[Way, ...] = ("forward", "backward", "both")
PINGS = 20
TRIALS = 3
LARGEST_SECONDS = 0.06
"""Of the largest message: long beside start-up times and token buckets."""
LARGEST_BYTES = 1 << 28
SMALLEST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReading:
    """What the lower rank of a pair found."""

    ranks: tuple[int, int]
    way: Way
    line: AlphaBeta


class Pair:
    """One end of a link. Both ends make the same calls; the lower rank leads and gets the readings."""

    def __init__(self, world: World, ranks: tuple[int, int]) -> None:
        self._world, self._ranks = world, ranks
        self._exchange = Exchange(world, ranks)
        self._leads = self._exchange.member == 0
        self._order = torch.zeros(1, dtype=torch.int64, device=world.device)
        self._buffers = (self._bytes(0), self._bytes(0))

    def latency(self) -> float | None:
        """Seconds of a message of one byte, one way; None for the rank that does not lead."""
        byte, times = self._bytes(1), []
        for _ in range(PINGS + 3):
            start = time.perf_counter()
            for sends in (self._leads, not self._leads):
                self._move(byte if sends else None, None if sends else byte)
            times.append((time.perf_counter() - start) / 2)
        return statistics.median(times[3:]) if self._leads else None

    def rate(self, way: Way) -> PairReading | None:
        """The fitted line of messages in this direction; None for the rank that does not lead."""
        if not self._leads:
            while size := self._receive_order():
                self._message(size, way)
            return None
        times: dict[int, list[float]] = {}
        for size in self._sizes(way):
            times.setdefault(size, []).append(self._lead(size, way))
        self._send_order(0)
        line = fit_alpha_beta(list(times), [statistics.median(t) for t in times.values()])
        return PairReading(ranks=self._ranks, way=way, line=line)

    def _sizes(self, way: Way) -> Iterator[int]:
        """Every size of the measurement, as often as it is sent; small ones to find the largest are not counted."""
        size = SMALLEST_BYTES
        self._lead(size, way)
        while (taken := self._lead(size, way)) < LARGEST_SECONDS / 2 and size < LARGEST_BYTES:
            size = min(LARGEST_BYTES, int(size * min(8.0, max(2.0, LARGEST_SECONDS / taken))))
        for _ in range(TRIALS):
            yield from (size, size // 2, size // 4, size // 8)

    def _lead(self, size: int, way: Way) -> float:
        self._send_order(size)
        return self._message(size, way)

    def _message(self, size: int, way: Way) -> float:
        """One message, and a byte back that says it has arrived; seconds as this end sees them."""
        if len(self._buffers[0]) < size:
            self._buffers = (self._bytes(size), self._bytes(size))
        out, into = (buffer[:size] for buffer in self._buffers)
        sends = way == "both" or (way == "forward") == self._leads
        receives = way == "both" or not sends
        self._world.synchronise()
        start = time.perf_counter()
        self._move(out if sends else None, into if receives else None)
        arrived = not sends if way != "both" else not self._leads
        self._move(self._bytes(1) if arrived else None, None if arrived else self._bytes(1))
        return time.perf_counter() - start

    def _send_order(self, size: int) -> None:
        self._order.fill_(size)
        self._move(self._order, None)

    def _receive_order(self) -> int:
        self._move(None, self._order)
        return int(self._order)

    def _move(self, out: torch.Tensor | None, into: torch.Tensor | None) -> None:
        peer = 1 - self._exchange.member
        sends = [] if out is None else [(peer, out)]
        receives = [] if into is None else [(peer, into)]
        self._exchange.start(sends, receives, "probe").wait()
        self._world.synchronise()

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self._world.device)
