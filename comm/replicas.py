"""The fixed groups of a pipeline: the ranks of one replica, in a chain of stages, and the ranks that share a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

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
    """The ranks of this stage as a world of their own (its rank is the replica): gradients are summed in it."""
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

    def mine(sets: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """Makes a group for each set; all ranks make all groups in the same order."""
        own = None
        for ranks in sets:
            if len(ranks) < 2:
                continue
            group = world.new_group(ranks, timeout)
            if world.rank in ranks:
                own = group
                groups.append(group)
        return own

    chain_group = mine(chains)
    # the sum over a stage's replicas is one over `gradients`, in a world that has only these ranks
    own = mine(stages)
    peers = replace(
        world,
        rank=replica,
        size=len(stages[stage]),
        members=tuple(stages[stage]),
        names=tuple(world.names[rank] for rank in stages[stage]),
        gradients=own,
        collectives=TorchCollectives(own) if own else None,
    )
    return PipelineGroups(stage, replica, chains[replica], chain_group, peers, groups)
