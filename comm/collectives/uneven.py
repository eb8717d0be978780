"""Collectives for unequal links: owners of uneven parts sum them for all, in pieces, while other work goes on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.collectives.engine import CollectiveEngine, window
from heteromesh.comm.collectives.gloo import GlooTransport
from heteromesh.comm.collectives.schedule import ReductionSchedule
from heteromesh.comm.interfaces import OnceWork, Transport, Work
from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.planner.reduction.reduction import Reduction

_TAGS = 1 << 12
"""Collectives told apart by tag; many more than are ever under way at once."""


class UnevenCollectives(Collectives):
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
        """Of gloo's ring, what a ring sends."""
        self.transport, self._ring = transport, ring
        self._count = 0
        self._engine = CollectiveEngine(window(reduction.seconds_per_byte))

    def bounds(self, numel: int) -> tuple[int, ...]:
        return self.reduction.bounds(numel)

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        if self._ring is not None and self.reduction.ring and flat.dtype not in (torch.bfloat16, torch.float16):
            self._check(flat)
            work: Any = dist.all_reduce(flat, group=self._ring, async_op=True)
            return OnceWork(lambda: self._finish_ring(work, flat.nbytes))
        return self._start("all_reduce", flat, frozenset(range(self.size)), frozenset(range(self.size)))

    def reduce_scatter(self, flat: torch.Tensor, key: int | None = None, *, cuts: Sequence[int] = ()) -> Work:
        return self._start("reduce_scatter", flat, frozenset(range(self.size)), frozenset(), cuts)

    def all_gather(
        self, flat: torch.Tensor, receivers: Collection[int] | None = None, *, cuts: Sequence[int] = ()
    ) -> Work:
        takers = frozenset(range(self.size) if receivers is None else receivers)
        return self._start("all_gather", flat, None, takers, cuts)

    def close(self) -> None:
        """Ends the threads, after what they are waiting for. The transport stays the caller's."""
        self._engine.close()

    def _start(
        self,
        name: str,
        flat: torch.Tensor,
        sources: frozenset[int] | None,
        receivers: frozenset[int],
        cuts: Sequence[int] = (),
    ) -> Work:
        self._check(flat)
        if isinstance(self._engine.error, GroupAborted):
            raise self._engine.error
        if self._engine.error is not None:
            raise RuntimeError("an earlier collective failed here: no other can follow") from self._engine.error
        bounds = cuts or self.bounds(flat.numel())
        schedule = ReductionSchedule(
            self.transport, self.reduction, bounds, flat.view(-1), self._next_tag(), sources, receivers
        )
        wait = self._engine.start(schedule)

        def finish() -> None:
            with self._recorded(name):
                wait()
            self.sent_bytes += schedule.sent_bytes
            schedule.release()

        return OnceWork(finish)

    def _recorded(self, name: str) -> AbstractContextManager[None]:
        """Returns a context that the diagnosis sees; ranks wait for their collectives in the same order."""
        return self.transport.records.operation(name) if isinstance(self.transport, TcpTransport) else nullcontext()

    def _finish_ring(self, work: Any, size: int) -> None:
        work.wait()
        self.sent_bytes += 2 * size * (self.size - 1) // self.size

    def _next_tag(self) -> int:
        self._count += 1
        return Tag.UNEVEN + self._count % _TAGS * 4

    def _check(self, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"tensors of collectives must be contiguous, got strides {tensor.stride()}")
        if tensor.device.type != "cpu":
            raise ValueError(f"tensors of these collectives must be on the CPU, got one on {tensor.device}")


def open_collectives(group: dist.ProcessGroup, reduction: Reduction) -> UnevenCollectives:
    """Returns collectives inside a gloo group, which stays the caller's and must see nothing else at the same time."""
    return UnevenCollectives(GlooTransport(group), reduction, ring=group)
