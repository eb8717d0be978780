"""Collectives by torch.distributed itself: for device tensors, and where no rank owns more than the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from heteromesh.comm.collectives.api import Collectives, bounds_of
from heteromesh.comm.interfaces import OnceWork, Work


class TorchCollectives(Collectives):
    """Collectives of a process group (NCCL on CUDA devices, gloo's ring on CPUs), with any owners.

    fractions: per rank, how much of a tensor it owns; empty: even shares.
    """

    def __init__(self, group: dist.ProcessGroup, fractions: Sequence[float] = ()) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent_bytes = 0
        self._group = group
        self._fractions = tuple(fractions) or (1.0,) * self.size

    def bounds(self, numel: int) -> tuple[int, ...]:
        return bounds_of(self._fractions, numel)

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        return self._finished_by([work], 2 * flat.nbytes * (self.size - 1) // self.size)

    def reduce_scatter(self, flat: torch.Tensor, key: int | None = None, *, cuts: Sequence[int] = ()) -> Work:
        """Starts one reduction an owner."""
        parts = self._parts(flat, cuts)
        works = [dist.reduce(part, group_dst=i, group=self._group, async_op=True) for i, part in parts]
        return self._finished_by(works, sum(part.nbytes for i, part in parts if i != self.rank))

    def all_gather(
        self, flat: torch.Tensor, receivers: Collection[int] | None = None, *, cuts: Sequence[int] = ()
    ) -> Work:
        """Starts one broadcast an owner; to some receivers, messages from owner to receiver."""
        parts = self._parts(flat, cuts)
        if receivers is not None:
            return self._send_to(parts, receivers)
        works = [dist.broadcast(part, group_src=i, group=self._group, async_op=True) for i, part in parts]
        sent = sum(part.nbytes for i, part in parts if i == self.rank)
        return self._finished_by(works, sent * (self.size - 1))

    def close(self) -> None:
        """Does nothing: the group is the caller's."""

    def _send_to(self, parts: Sequence[tuple[int, torch.Tensor]], receivers: Collection[int]) -> Work:
        group = self._group
        messages = [
            dist.P2POp(dist.isend, part, group=group, group_peer=peer)
            for owner, part in parts
            for peer in sorted(receivers)
            if owner == self.rank != peer
        ]
        sent = sum(message.tensor.nbytes for message in messages)
        messages += [
            dist.P2POp(dist.irecv, part, group=group, group_peer=owner)
            for owner, part in parts
            if self.rank in receivers and owner != self.rank
        ]
        # not all ranks come here; NCCL wants them all in a group's first call, which was the broadcast of the model
        return self._finished_by(dist.batch_isend_irecv(messages) if messages else [], sent)

    def _parts(self, flat: torch.Tensor, cuts: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
        ranges = pairwise(cuts or self.bounds(flat.numel()))
        return [(i, flat[low:high]) for i, (low, high) in enumerate(ranges) if low < high]

    def _finished_by(self, works: Sequence[Any], sent: int) -> Work:
        def finish() -> None:
            for work in works:
                work.wait()
            self.sent_bytes += sent

        return OnceWork(finish)
