"""Collectives by torch.distributed itself: for device tensors, and where no rank owns more than the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist

from heteromesh.comm.world import World


class Waitable(Protocol):
    """A collective under way; its tensors must not be touched before `wait` has returned."""

    def wait(self) -> None:
        """Returns when the result is here; raises what went wrong."""


class FlatCollectives(Protocol):
    """Sums and copies of flat tensors over all ranks, in place; every rank makes the same calls in the same order."""

    sent_bytes: int
    """By collectives that were waited for."""

    def bounds(self, numel: int) -> Sequence[int]:
        """size + 1 offsets: rank i owns [bounds[i], bounds[i + 1]) of a tensor of so many elements."""

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """The sum over the ranks."""

    def reduce_scatter(self, flat: torch.Tensor) -> Waitable:
        """This rank's own range holds the sum afterwards; the rest is undefined."""

    def all_gather(self, flat: torch.Tensor) -> Waitable:
        """Every rank's own range is copied to all."""


class NativeCollectives:
    """Collectives of the world's gradient group (NCCL on CUDA devices, gloo's ring on CPUs), with any owners.

    fractions: per rank, how much of a tensor it owns; they add up to 1. Empty: even shares.
    """

    def __init__(self, world: World, fractions: Sequence[float] = ()) -> None:
        self.sent_bytes = 0
        self._world = world
        self._fractions = tuple(fractions) or (1 / world.size,) * world.size

    def bounds(self, numel: int) -> tuple[int, ...]:
        """See FlatCollectives."""
        inner = [min(numel, round(numel * sum(self._fractions[: i + 1]))) for i in range(self._world.size - 1)]
        return (0, *inner, numel)

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See FlatCollectives."""
        work = dist.all_reduce(flat, group=self._world.gradients, async_op=True)
        return _Works(self, [work], 2 * flat.nbytes * (self._world.size - 1) // self._world.size)

    def reduce_scatter(self, flat: torch.Tensor) -> Waitable:
        """See FlatCollectives. One reduction an owner."""
        group = self._world.gradients
        works = [dist.reduce(part, group_dst=i, group=group, async_op=True) for i, part in self._parts(flat)]
        sent = sum(part.nbytes for i, part in self._parts(flat) if i != self._world.rank)
        return _Works(self, works, sent)

    def all_gather(self, flat: torch.Tensor) -> Waitable:
        """See FlatCollectives. One broadcast an owner."""
        group = self._world.gradients
        works = [dist.broadcast(part, group_src=i, group=group, async_op=True) for i, part in self._parts(flat)]
        sent = sum(part.nbytes for i, part in self._parts(flat) if i == self._world.rank)
        return _Works(self, works, sent * (self._world.size - 1))

    def _parts(self, flat: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        cuts = pairwise(self.bounds(flat.numel()))
        return [(i, flat[low:high]) for i, (low, high) in enumerate(cuts) if low < high]


class _Works:
    def __init__(self, owner: NativeCollectives, works: Sequence[Any], sent: int) -> None:
        self._owner, self._works, self._sent = owner, works, sent

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._owner.sent_bytes += self._sent
        self._works, self._sent = (), 0
