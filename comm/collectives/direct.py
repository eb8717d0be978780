"""Collectives over an abortable TCP transport: sums in rank order, moved on by a thread while backwards run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import torch

from heteromesh.comm.collectives.api import Collectives, bounds_of
from heteromesh.comm.interfaces import OnceWork, Work
from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.collectives import SMALL_BYTES, DirectSum, all_gather
from heteromesh.comm.tcp.transport import TcpTransport


class DirectCollectives(Collectives):
    """Collectives of one epoch: every rank sends each owner its part, which the owner sums in rank order.

    Every run and every rank gets the same bits, and checksums travel with the messages. One thread does one collective
    after the other, on tags of its own, so that the calls of another thread on the same transport don't meet them.

    fractions: per rank, how much of a tensor it owns; empty: even shares. Tensors are contiguous and on the CPU.
    """

    def __init__(self, transport: TcpTransport, fractions: Sequence[float] = ()) -> None:
        self.rank, self.size = transport.rank, transport.size
        self.sent_bytes = 0
        self._transport = transport
        self._fractions = tuple(fractions) or (1.0,) * self.size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-direct-sum")

    def bounds(self, numel: int) -> tuple[int, ...]:
        return bounds_of(self._fractions, numel)

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        return self._sum(flat, gather=True)

    def reduce_scatter(self, flat: torch.Tensor, key: int | None = None, *, cuts: Sequence[int] = ()) -> Work:
        return self._sum(flat, gather=False, bounds=cuts)

    def all_gather(
        self, flat: torch.Tensor, receivers: Collection[int] | None = None, *, cuts: Sequence[int] = ()
    ) -> Work:
        parts = [flat[low:high] for low, high in pairwise(cuts or self.bounds(flat.numel()))]
        takers = range(self.size) if receivers is None else receivers
        sent = parts[self.rank].nbytes * sum(r != self.rank for r in takers)
        return self._submit("all_gather", lambda: all_gather(self._transport, parts, Tag.DIRECT + 3, takers), sent)

    def close(self) -> None:
        self._thread.shutdown()

    def _sum(self, flat: torch.Tensor, *, gather: bool, bounds: Sequence[int] = ()) -> Work:
        cuts = list(pairwise(bounds or self.bounds(flat.numel())))
        low, high = cuts[self.rank]

        def act() -> None:
            if self.size > 1 and flat.numel():
                run = DirectSum(self._transport, checked=True, tag=Tag.DIRECT)
                if gather and flat.nbytes <= SMALL_BYTES:
                    run.whole(flat, flat)
                    return
                run.sharded(flat, flat if gather else flat[low:high], cuts, gather=gather)

        sent = flat[:low].nbytes + flat[high:].nbytes + (flat[low:high].nbytes * (self.size - 1) if gather else 0)
        return self._submit("all_reduce" if gather else "reduce_scatter", act, sent)

    def _submit(self, name: str, act: Callable[[], None], sent: int) -> Work:
        done: Future[None] = self._thread.submit(act)

        def finish() -> None:
            # where the ranks meet is told to the diagnosis in the order of the waits, which is the same on all of them
            with self._transport.records.operation(name):
                done.result()
            self.sent_bytes += sent

        return OnceWork(finish)
