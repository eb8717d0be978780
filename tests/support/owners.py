"""Collectives through owners of any shares, never a ring: a plain sum has the bits of a sharded one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from heteromesh.comm.collectives.torch import TorchCollectives
from heteromesh.comm.collectives.uneven import open_collectives
from heteromesh.comm.world import World
from heteromesh.planner.reduction.reduction import Reduction


def owners(fractions: Sequence[float], size: int) -> tuple[float, ...]:
    """Of `size` ranks; what is left over goes to the last."""
    shares = (*fractions, *(0.0,) * size)[:size] if fractions else (1 / size,) * size
    return (*shares[:-1], 1 - sum(shares[:-1]))


@contextmanager
def collectives_of(world: World, fractions: Sequence[float], native: bool = False) -> Iterator[Any]:
    shares = owners(fractions, world.size)
    if native:
        yield TorchCollectives(world.gradients, shares)
        return
    reduction = Reduction(
        hosts=tuple(range(world.size)),
        fractions=shares,
        seconds_per_byte=0.0,
        bound_seconds_per_byte=0.0,
        ring_seconds_per_byte=1.0,
    )
    collectives = open_collectives(world.gradients, reduction)
    try:
        yield collectives
    finally:
        collectives.close()
