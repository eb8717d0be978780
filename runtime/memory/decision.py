"""Whether a job's weights must be sharded: where ranks are known to have too little memory for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.call import uncompiled
from heteromesh.parallel.model.layers import outermost_layers
from heteromesh.parallel.state.separable import check_separable
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.ownership.in_job import JobModel, JobRank, replicated_in_job
from heteromesh.runtime.config import SHARDED_WEIGHTS_REFUSE, TrainerConfig
from heteromesh.runtime.memory.sizes import job_model, job_ranks


@dataclass(frozen=True, slots=True)
class ShardingDecision:
    """Whether weights are sharded, and a line for people where there is something to say."""

    shard: bool
    told: str = ""


def decide(
    config: TrainerConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    cluster: Cluster,
    *,
    described: bool,
) -> ShardingDecision:
    """Returns what `shard_weights` comes to in this world; equal on every rank.

    auto: sharded where the whole weights, their gradients and the optimizer's state don't fit a rank whose memory is
    known (`described`: by the cluster file). Where they don't and can't be sharded, the job goes on as it would, and
    the line says so.
    """
    asked = config.shard_weights
    if asked != "auto":
        return ShardingDecision(asked)
    ranks = job_ranks(cluster, world, model, described=described)
    if world.size == 1 or all(math.isinf(rank.memory) for rank in ranks):
        return ShardingDecision(False)
    short = world.once(lambda: _short(job_model(model, (), optimizer), ranks, sharded=config.shard_optimizer))
    if not short:
        return ShardingDecision(False)
    where = ", ".join(f"rank {rank} ({size / 1e9:.2f} GB)" for rank, size in short)
    told = f"whole weights, gradients and optimizer state exceed the memory of {where}"
    obstacle = world.once(lambda: _obstacle(config, model, optimizer))
    if obstacle:
        return ShardingDecision(
            False, f"{told}, and weights can't be sharded: {obstacle}; the job may run out of memory"
        )
    return ShardingDecision(True, f"{told}: weights are sharded (shard_weights=False keeps them whole)")


def _short(model: JobModel, ranks: Sequence[JobRank], *, sharded: bool) -> list[tuple[int, float]]:
    """Returns (rank, bytes that it lacks) of ranks that can't hold whole weights. sharded: the optimizer's state is."""
    held = [
        replicated_in_job(model, rank, optimizer=0.0 if sharded else 1.0, pass_bytes=0.0, ranks=len(ranks)).total
        for rank in ranks
    ]
    missing = [(number, size - rank.memory) for number, (size, rank) in enumerate(zip(held, ranks, strict=True))]
    short = [(number, size) for number, size in missing if size > 0]
    state = model.state * model.whole_trained
    if not sharded or short:
        return short
    left = state - sum(min(state, -size) for _, size in missing)
    return [(number, left / len(ranks)) for number, _ in missing] if left > 0 else []


def _obstacle(config: TrainerConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Says why weights can't be sharded; empty where they can."""
    for name, reason in SHARDED_WEIGHTS_REFUSE.items():
        if getattr(config, name):
            return f"{name} is {getattr(config, name)!r} ({reason})"
    inner = uncompiled(model)
    if not outermost_layers(inner):
        return f"{type(inner).__name__} has no layers in an nn.ModuleList"
    try:
        check_separable(optimizer)
    except UserError as error:
        return str(error)
    return ""
