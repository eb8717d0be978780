"""The fixed groups of a pipeline: the ranks of one replica, in a chain of stages, and the ranks that share a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from heteromesh.comm.collectives.torch import TorchCollectives
from heteromesh.comm.exchange import Exchange
from heteromesh.comm.world import World


@dataclass(slots=True)
class PipelineGroups:
    """One rank's place in a pipeline and the communicators that go with it. Made by `join_pipeline`."""

    stage: int
    replica: int
    chain: tuple[int, ...]
    """World ranks of this rank's replica, by stage."""
    chain_group: dist.ProcessGroup | None
    """Of `chain`; None where there is one stage."""
    peers: World
    """The ranks of this stage as a world of their own, in ascending order: gradients are summed in it."""
    _groups: list[dist.ProcessGroup]

    def chain_members(self) -> dict[int, int]:
        """Returns, by stage, the rank inside `chain_group` (torch sorts a group's ranks)."""
        ordered = sorted(self.chain)
        return {stage: ordered.index(rank) for stage, rank in enumerate(self.chain)}

    def add_partner(self, world: World, tensor: torch.Tensor, partner: int) -> None:
        """Adds the tensor of the chain's stage `partner` to this rank's, in place; both call this, and end up alike."""
        exchange = Exchange(world, sorted((world.rank, self.chain[partner])))
        received = torch.empty_like(tensor)
        there = 1 - exchange.member
        exchange.start([(there, tensor)], [(there, received)], "tied weight").wait()
        tensor.add_(received)

    def close(self) -> None:
        """Gives the communicators back; every rank of the world must have finished its exchanges."""
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups.clear()


def join_pipeline(
    world: World, stages: Sequence[Sequence[int]], timeout: timedelta = timedelta(minutes=10)
) -> PipelineGroups:
    """Finds this rank's place among `stages`: stages[s][r] is the world rank of stage s in replica r.

    Every rank of the world must call this with the same stages, which name each rank once; equally many ranks a stage.
    """
    stage = next(s for s, ranks in enumerate(stages) if world.rank in ranks)
    replica = list(stages[stage]).index(world.rank)
    chains = [tuple(ranks[r] for ranks in stages) for r in range(len(stages[0]))]
    groups: list[dist.ProcessGroup] = []

    def mine(sets: Sequence[Sequence[int]], make: Callable[[Sequence[int]], Any]) -> dist.ProcessGroup | None:
        """Makes a group for each set; all ranks make all groups in the same order."""
        own = None
        for ranks in sets:
            if len(ranks) < 2:
                continue
            group = make(sorted(ranks))
            if world.rank in ranks:
                own = group
                groups.append(group)
        return own

    def on_devices(ranks: Sequence[int]) -> dist.ProcessGroup:
        return world.new_group(ranks, timeout)

    chain_group, gradients = mine(chains, on_devices), mine(stages, on_devices)
    members = sorted(stages[stage])
    peers = replace(
        world,
        rank=members.index(world.rank),
        size=len(members),
        members=tuple(members),
        names=tuple(world.names[rank] for rank in members),
        cluster=world.cluster and world.cluster.subset(members),
        gradients=gradients,
        collectives=TorchCollectives(gradients) if gradients else None,
        statistics=mine(stages, lambda ranks: dist.new_group(ranks, timeout=timeout, backend="gloo")),
        control=None,
        checkpoint=None,
    )
    return PipelineGroups(stage, replica, chains[replica], chain_group, peers, groups)
