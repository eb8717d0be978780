"""Some of the ranks of a world as a world of their own, while the others wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from heteromesh.comm.collectives.torch import TorchCollectives
from heteromesh.comm.world import PATIENT, World


@contextmanager
def join_subset(world: World, ranks: Sequence[int], timeout: timedelta) -> Iterator[World | None]:
    """Makes a world of these ranks, ascending, numbered from 0; None on the others.

    Every rank of the world must enter it together, with the same ranks. timeout: for passes and gradients.
    """
    if len(ranks) == 1:
        yield _numbered(world, ranks) if world.rank in ranks else None
        return
    exchange, gradients = world.new_group(ranks, timeout), world.new_group(ranks, timeout)
    control, checkpoint, statistics = (_gloo(ranks, limit) for limit in (PATIENT, PATIENT, timeout))
    if world.rank not in ranks:
        yield None
        return
    part = replace(
        _numbered(world, ranks),
        exchange=exchange,
        gradients=gradients,
        control=control,
        checkpoint=checkpoint,
        statistics=statistics,
        collectives=TorchCollectives(gradients),
    )
    if world.device.type == "cuda":
        # NCCL builds a communicator at its first use, and that first use must include every rank
        dist.all_reduce(torch.zeros(1, device=world.device), group=exchange)
    try:
        yield part
        # gloo aborts when a peer destroys its pairs while another still uses them
        part.barrier()
    finally:
        for group in (exchange, gradients, control, checkpoint, statistics):
            dist.destroy_process_group(group)


def _numbered(world: World, ranks: Sequence[int]) -> World:
    """Returns the world of these ranks without any communicator."""
    return replace(
        world,
        rank=list(ranks).index(world.rank),
        size=len(ranks),
        members=tuple(world.members[rank] for rank in ranks),
        names=tuple(world.names[rank] for rank in ranks),
        cluster=world.cluster and world.cluster.subset(ranks),
        exchange=None,
        gradients=None,
        control=None,
        checkpoint=None,
        statistics=None,
        collectives=None,
    )


def _gloo(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(sorted(ranks), timeout=timeout, backend="gloo")
    return group
