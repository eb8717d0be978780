"""What the ranks of a job with whole weights hold, and where their optimizer's state lies."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.ownership.in_job import JobModel, JobRank, replicated_in_job
from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes
from heteromesh.planner.ownership.state_tiers import StateTiers, kept_share
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.memory.offload import NOTHING_OFFLOADED, OptimizerOffload, TiersBelow, limited, tiers_below
from heteromesh.runtime.memory.sizes import SPARE, job_model, job_ranks, usable_bytes
from heteromesh.runtime.process.memory import memory_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedJob:
    """Ranks with whole weights, and the optimizer's state whole or in parts."""

    model: JobModel
    ranks: tuple[JobRank, ...]
    """As they were before there was state, where any of it is offloaded; else empty until they are measured."""
    shares: tuple[float, ...]
    """Of the state, by rank."""
    tokens: TokenBytes
    longest: int
    """Tokens of a sequence."""
    offload: OptimizerOffload = NOTHING_OFFLOADED
    copied: bool = True
    """Whether a checkpoint is written from a copy, while training goes on."""

    def memory(self, of_pass: Sequence[float], of_step: Sequence[float]) -> tuple[MemoryByKind, ...]:
        """Returns by rank what it holds at the most in a step of so many tokens by rank."""
        return tuple(
            replicated_in_job(
                self.model,
                rank,
                optimizer=share,
                pass_bytes=self.tokens.per_pass * p + self.tokens.per_step * t,
                ranks=len(self.shares),
                copied=self.copied,
            )
            for rank, share, p, t in zip(self.ranks, self.shares, of_pass, of_step, strict=True)
        )

    def bounded(self, costs: Costs, config: TrainerConfig) -> Costs:
        """Returns the costs with passes that fit beside what is held, where state had to be offloaded."""
        count = len(self.shares)
        if not self.offload.is_used or config.tokens_per_device is not None:
            return costs
        held = self.memory([0.0] * count, [min(1.0, 1.1 / count) * config.batch_tokens] * count)
        each = max(1.0, self.tokens.per_pass)
        room = [(rank.memory - memory.total) / each for rank, memory in zip(self.ranks, held, strict=True)]
        least = math.ceil(self.longest / count)  # the ranks together must hold the longest sequence
        most = [max(least, int(free)) if math.isfinite(free) else sys.maxsize for free in room]
        return replace(costs, capacity=tuple(map(min, costs.capacity, most)))


def hold_whole(
    config: TrainerConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    cluster: Cluster,
    *,
    described: bool,
    shares: Sequence[float],
    tokens: TokenBytes,
    longest: int,
) -> ReplicatedJob:
    """Returns what ranks with whole weights hold, equal on every rank; every rank must call it.

    described: whether the cluster file is the user's. shares: of the state, by rank. longest: tokens of a sequence.
    Raises UserError, on every rank, where a rank's memory does not even hold what can't leave it, and where a tier has
    too little space.
    """
    found = ReplicatedJob(
        model=job_model(model, (), optimizer), ranks=(), shares=tuple(shares), tokens=tokens, longest=longest
    )
    asked = config.offload_optimizer
    known = math.isfinite(min(usable_bytes(cluster, world, described), memory_limit()[0]))
    if asked == "none" or (asked == "auto" and not any(world.gather(known))):
        return found
    ranks = limited(world, job_ranks(cluster, world, model, described=described))
    below = tiers_below(config, optimizer, world, cluster)

    offload = world.once(lambda: _decide(found, ranks, below, config.batch_tokens))
    if offload.is_used:
        return replace(found, offload=offload, ranks=offload.within(ranks), copied=False)
    copies = [m.total for m in replace(found, ranks=tuple(ranks)).memory([0.0] * world.size, [0.0] * world.size)]
    fit = all(size <= rank.memory for size, rank in zip(copies, ranks, strict=True))
    return replace(found, offload=offload, copied=fit)


def _decide(job: ReplicatedJob, ranks: Sequence[JobRank], below: TiersBelow, step: int) -> OptimizerOffload:
    """Returns where the state lies. step: tokens of all ranks."""
    kept, short = _kept(job, ranks, step)
    if min(kept) >= 1 and below.asked == "auto":
        return NOTHING_OFFLOADED
    if below.obstacle and below.asked == "auto":
        return replace(
            NOTHING_OFFLOADED,
            note="weights, gradients and optimizer state exceed the memory of some rank, and the state can't be "
            f"offloaded ({below.obstacle}): the job may run out of memory",
        )
    if short:
        lacks = ", ".join(f"{size / 1e9:.3f} GB on rank {rank}" for rank, size in short)
        raise UserError(
            "no set of tiers holds the model: even with all optimizer state on lower ones memory is short by "
            f"{lacks} for weights, gradients and a sequence of {job.longest} tokens; what helps: shorter sequences "
            "(max_length), checkpoint_activations=True, more ranks with shard_weights=True, more memory"
        )
    return below.placed(kept, [share * job.model.state * job.model.whole_trained for share in job.shares])


def _kept(job: ReplicatedJob, ranks: Sequence[JobRank], step: int) -> tuple[list[float], list[tuple[int, float]]]:
    """Returns by rank the share of its state that its memory has room for, and (rank, bytes that it lacks) of those
    that have no room for all else. step: tokens of all ranks.
    """
    count, found, short = len(ranks), list[float](), list[tuple[int, float]]()
    least, mine = math.ceil(job.longest / count), min(1.0, 1.1 / count) * step
    for number, (rank, share) in enumerate(zip(ranks, job.shares, strict=True)):

        def held(in_memory: float, of_pass: float, number: int = number) -> float:
            own = tuple(replace(r, in_memory=in_memory) for r in ranks)
            return replace(job, ranks=own, copied=False).memory([of_pass] * count, [mine] * count)[number].total

        size = share * job.model.state * job.model.whole_trained
        room = [kept_share(rank.memory - held(0.0, n), size) for n in (job.longest, least)]
        if max(room) < 0:
            short.append((number, held(StateTiers(device=0.0).in_memory, least) - rank.memory))
        found.append(max(0.0, next((kept for kept in room if kept >= 0), 0.0)))
    return found, [(number, lacks) for number, lacks in short if lacks > SPARE * ranks[number].memory]
