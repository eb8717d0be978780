"""The cost model of a cluster for which constants were measured."""

from __future__ import annotations

import math
from dataclasses import replace

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster, MeasuredModel
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.model.attention import AttentionShape, ModelAttention
from heteromesh.planner.model.constants import Constants
from heteromesh.planner.model.spec import ModelSpec


def bind(constants: Constants, cluster: Cluster) -> Costs:
    """Returns the costs that the constants mean on every rank of a cluster.

    Speeds are the cluster's (measured, else peak TFLOP/s over the fastest device's); tokens that fit scale with a
    device's memory over the largest memory (of a part of a cluster: of the whole's). Raises UserError where a device
    is left without room for a token.
    """
    largest = max(cluster.whole.devices[host.device].memory_gb for host in cluster.whole.hosts)
    memory = [cluster.device_of(rank).memory_gb for rank in range(cluster.ranks)]
    capacity = tuple(math.floor(constants.tokens_per_device * m / largest) for m in memory)
    if min(capacity) < 1:
        rank = capacity.index(min(capacity))
        raise UserError(
            f"rank {rank} ({cluster.device_name(rank)}) has room for no token: tokens_per_device is "
            f"{constants.tokens_per_device} for the largest memory, raise it or leave that host out of the cluster file"
        )
    return Costs(
        **constants.seconds,
        speeds=cluster.speeds(),
        capacity=capacity,
        methods=(Method(name=constants.method, bytes_per_token=constants.bytes_per_token),),
        rate=RateByDegree(constants.bytes_per_second),
        hosts=cluster.rank_hosts,
    )


def measured_costs(cluster: Cluster, model: ModelSpec | None = None) -> Costs | None:
    """Returns `[measured]` bound to the cluster's ranks; None where it has no constants, or has another model's.

    Methods and links that were measured too take the place of the constants' one method and rates by degree.
    """
    measured = cluster.measured
    if measured.constants is None or (model and measured.model and not _same(model, measured.model)):
        return None
    costs = bind(measured.constants, cluster)
    if measured.methods:
        costs = replace(costs, methods=measured.methods)
    if measured.link_gbps or measured.nic_gbit:
        costs = replace(costs, rate=cluster_links(cluster))
    return replace(costs, attention=_attention(measured.model)) if measured.model else costs


def model_measured_instead(cluster: Cluster, model: ModelSpec) -> str:
    """Returns the model whose costs `[measured]` has, where they are not this one's; else empty."""
    measured = cluster.measured
    other = measured.constants and measured.model and not _same(model, measured.model)
    return measured.model.name if other and measured.model else ""


def _attention(model: MeasuredModel) -> ModelAttention:
    itemsize = 2 if model.dtype == "bf16" else 4
    shape = AttentionShape(heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, itemsize=itemsize)
    return ModelAttention(calls=model.layers, shape=shape)


def _same(model: ModelSpec, measured: MeasuredModel) -> bool:
    if model.local:  # what was measured has no windows
        return False
    shape = (model.parameters(), model.layers, model.heads, model.kv_heads, model.head_dim)
    return shape == (measured.parameters, measured.layers, measured.heads, measured.kv_heads, measured.head_dim)
