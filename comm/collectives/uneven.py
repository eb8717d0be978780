"""Collectives for unequal links: owners of uneven parts sum them for all, in pieces, while other work goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from heteromesh.comm.collectives.engine import Progress, window
from heteromesh.comm.collectives.gloo import GlooTransport
from heteromesh.comm.collectives.schedule import Flow
from heteromesh.comm.interfaces import Transport, Work
from heteromesh.planner.reduction.reduction import Reduction

_TAGS = 1 << 12
"""Collectives told apart by tag; many more than are ever under way at once."""


class Handle:
    """A collective under way. Its tensors must not be touched before `wait` has returned."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Returns when the result is here and all buffers may be reused; raises what went wrong, each time."""
        finish, self._finish = self._finish, None
        if finish is not None:
            try:
                finish()
            except BaseException as error:
                self._error = error
        if self._error is not None:
            raise self._error


class Collectives:
    """Sums and copies over all ranks of a transport, as a `Reduction` says who owns what.

    One object per process. Every rank makes the same calls in the same order, with tensors of the same size and
    type; calls return at once and progress in threads of their own. Tensors are contiguous and on the CPU
    (ValueError otherwise, before anything is posted). Sums of bf16 and fp16 are formed in fp32 and rounded once, by
    the owner; all ranks get the same bits. After an error every later call fails: make a new object.

    `ring`: a gloo group; all-reduces go through its own ring where the reduction says that is as fast (fp32, fp64
    and integers: the ring rounds bf16 at every rank).
    """

    def __init__(self, transport: Transport, reduction: Reduction, ring: dist.ProcessGroup | None = None) -> None:
        if transport.size != len(reduction.hosts):
            raise ValueError(f"a reduction over {len(reduction.hosts)} ranks on a transport of {transport.size}")
        self.reduction = reduction
        self.rank, self.size = transport.rank, transport.size
        self.sent_bytes = 0
        """By collectives that were waited for; of gloo's ring, what a ring sends."""
        self.transport, self._ring = transport, ring
        self._count = 0
        self._progress = Progress(window(reduction.seconds_per_byte))

    def bounds(self, numel: int) -> tuple[int, ...]:
        """size + 1 offsets: rank i owns [bounds[i], bounds[i + 1]) of a tensor of so many elements."""
        return self.reduction.bounds(numel)

    def all_reduce(self, flat: torch.Tensor) -> Handle:
        """The sum over the ranks, in place."""
        if self._ring is not None and self.reduction.ring and flat.dtype not in (torch.bfloat16, torch.float16):
            self._check(flat)
            work: Any = dist.all_reduce(flat, group=self._ring, async_op=True)
            return Handle(lambda: self._finish_ring(work, flat.nbytes))
        return self._flow(flat, frozenset(range(self.size)), spread=True)

    def reduce_scatter(self, flat: torch.Tensor) -> Handle:
        """This rank's own range of `flat` holds the sum afterwards; the rest is undefined."""
        return self._flow(flat, frozenset(range(self.size)), spread=False)

    def all_gather(self, flat: torch.Tensor) -> Handle:
        """Every rank's own range of `flat` is copied to all."""
        return self._flow(flat, None, spread=True)

    def broadcast(self, flat: torch.Tensor, source: int) -> Handle:
        """One rank's tensor is copied to all: dealt out to the owners, and from them to everybody."""
        if not 0 <= source < self.size:
            raise ValueError(f"broadcast from rank {source} of {self.size}")
        return self._flow(flat, frozenset((source,)), spread=True)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> Handle:
        """Sends `sends[i]` to rank i and fills `receives[i]` with what rank i sent; sizes may differ and be zero."""
        if not len(sends) == len(receives) == self.size:
            raise ValueError(f"{len(sends)} sends and {len(receives)} receives for {self.size} ranks")
        for tensor in (*sends, *receives):
            self._check(tensor)
        receives[self.rank].copy_(sends[self.rank])
        tag, peers = self._next_tag(), [(self.rank + i) % self.size for i in range(1, self.size)]
        works: list[Work] = [self.transport.recv(p, receives[p], tag) for p in peers if receives[p].numel()]
        works += [self.transport.send(p, sends[p], tag) for p in peers if sends[p].numel()]
        held = (tuple(sends), tuple(receives))

        def finish() -> None:
            for work in works:
                work.wait()
            self.sent_bytes += sum(held[0][p].nbytes for p in peers)

        return Handle(finish)

    def close(self) -> None:
        """Ends the threads, after what they are waiting for. The transport stays the caller's."""
        self._progress.close()

    def _flow(self, flat: torch.Tensor, sources: frozenset[int] | None, *, spread: bool) -> Handle:
        self._check(flat)
        if self._progress.error is not None:
            raise RuntimeError("an earlier collective failed here: no other can follow") from self._progress.error
        flow = Flow(self.transport, self.reduction, flat.view(-1), self._next_tag(), sources, spread)
        wait = self._progress.start(flow)

        def finish() -> None:
            wait()
            self.sent_bytes += flow.sent_bytes

        return Handle(finish)

    def _finish_ring(self, work: Any, size: int) -> None:
        work.wait()
        self.sent_bytes += 2 * size * (self.size - 1) // self.size

    def _next_tag(self) -> int:
        self._count += 1
        return self._count % _TAGS * 4

    def _check(self, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"tensors of collectives must be contiguous, got strides {tensor.stride()}")
        if tensor.device.type != "cpu":
            raise ValueError(f"tensors of these collectives must be on the CPU, got one on {tensor.device}")


def open_collectives(group: dist.ProcessGroup, reduction: Reduction) -> Collectives:
    """Collectives inside a gloo group, which stays the caller's and must see nothing else at the same time."""
    return Collectives(GlooTransport(group), reduction, ring=group)
