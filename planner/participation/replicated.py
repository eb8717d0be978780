"""Layouts in which every working rank holds all weights and gradients: what the Trainer executes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from heteromesh.errors import UserError
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.overlap import RECOMPUTED_FORWARD, StepTraffic
from heteromesh.planner.ownership.memory import FP32, MemoryByKind, replicated_memory, replicated_tokens
from heteromesh.planner.ownership.weights import ADAM_BYTES
from heteromesh.planner.participation.layout import REPLICATED, SHARDED_OPTIMIZER, Setting, WeightLayout
from heteromesh.planner.reduction.memory import largest_fractions
from heteromesh.planner.reduction.reduction import Reduction, reduction_for


def replicated(setting: Setting, ranks: Sequence[int]) -> WeightLayout:
    """Returns the layout whose gradients are all-reduced and whose optimizer state is whole on every rank."""
    cluster, model = setting.cluster.subset(ranks), setting.model
    reduction = reduction_for(cluster, in_waves=False)
    size = FP32.gradients * model.parameters()
    slowest = min(cluster.device_of(r).memory_gbps for r in range(cluster.ranks)) * 1e9
    return WeightLayout(
        kind=REPLICATED,
        ranks=tuple(ranks),
        fractions=dict.fromkeys(ranks, 1.0),
        memory={r: _memory(setting, r, 1.0) for r in ranks},
        tokens=replicated_tokens(model),
        traffic=StepTraffic(reduce_seconds=size * reduction.all_reduce_seconds_per_byte, chunks=model.layers),
        update_seconds=ADAM_BYTES * model.parameters() / slowest,
    )


def sharded_optimizer(setting: Setting, ranks: Sequence[int]) -> WeightLayout | None:
    """Returns the layout whose gradients are scattered to owners that update and gather weights; None where the ranks
    together can't hold the optimizer's state.
    """
    cluster, model = setting.cluster.subset(ranks), setting.model
    limits = largest_fractions(
        cluster,
        parameter_bytes=FP32.weights * model.parameters(),
        state_bytes=FP32.state * model.parameters(),
    )
    try:
        reduction = reduction_for(cluster, max_fraction=limits, in_waves=False)
    except UserError:
        return None
    size = FP32.gradients * model.parameters()
    one_way = size * scatter_seconds(setting, ranks, reduction)
    updates = [f / (cluster.device_of(r).memory_gbps * 1e9) for r, f in enumerate(reduction.fractions)]
    fractions = dict(zip(ranks, reduction.fractions, strict=True))
    return WeightLayout(
        kind=SHARDED_OPTIMIZER,
        ranks=tuple(ranks),
        fractions=fractions,
        memory={r: _memory(setting, r, f) for r, f in fractions.items()},
        tokens=replicated_tokens(model),
        traffic=StepTraffic(gather_seconds=one_way, reduce_seconds=one_way, chunks=model.layers),
        update_seconds=ADAM_BYTES * model.parameters() * max(updates),
    )


def recomputed(setting: Setting, layout: WeightLayout) -> WeightLayout:
    """Returns the layout with a backward that repeats the forward."""
    return replace(
        layout,
        tokens=replicated_tokens(setting.model, checkpointing=True),
        traffic=replace(layout.traffic, forward_share=RECOMPUTED_FORWARD),
        checkpointing=True,
    )


def scatter_seconds(setting: Setting, ranks: Sequence[int], reduction: Reduction) -> float:
    """Returns seconds per byte of a reduce-scatter to these owners; a gather from them takes as long."""
    cluster = setting.cluster.subset(ranks)
    links = cluster_links(cluster)
    hosts = range(len(cluster.hosts))
    seconds = 0.0
    pairs = zip(reduction.hosts, reduction.fractions, strict=True)
    for host, members in groupby(pairs, key=lambda pair: pair[0]):
        fractions = [f for _, f in members]
        owned = sum(fractions)
        if len(hosts) > 1:
            seconds = max(seconds, max(1 - owned, owned * (len(hosts) - 1)) / links.uplink(host, hosts))
        if len(fractions) > 1:
            seconds = max(seconds, (1 - min(fractions)) / links.link[host])
    return seconds


def _memory(setting: Setting, rank: int, optimizer: float) -> MemoryByKind:
    return replicated_memory(setting.model, device_bytes=setting.device_bytes(rank), optimizer=optimizer)
