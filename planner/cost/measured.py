"""The cost model of a cluster whose file has measured constants."""

from __future__ import annotations

from dataclasses import replace

from heteromesh.planner.cluster.cluster import Cluster, MeasuredModel
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.attention import AttentionShape, ModelAttention
from heteromesh.planner.model.constants import bind
from heteromesh.planner.model.spec import ModelSpec


def measured_costs(cluster: Cluster, model: ModelSpec | None = None) -> Costs | None:
    """`[measured]` bound to the cluster's ranks; None where it has no constants, or has another model's.

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
    """The model whose costs `[measured]` has, where they are not this one's; else empty."""
    measured = cluster.measured
    other = measured.constants and measured.model and not _same(model, measured.model)
    return measured.model.name if other and measured.model else ""


def _attention(model: MeasuredModel) -> ModelAttention:
    itemsize = 2 if model.dtype == "bf16" else 4
    shape = AttentionShape(heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, itemsize=itemsize)
    return ModelAttention(calls=model.layers, shape=shape)


def _same(model: ModelSpec, measured: MeasuredModel) -> bool:
    shape = (model.parameters(), model.layers, model.heads, model.kv_heads, model.head_dim)
    return shape == (measured.parameters, measured.layers, measured.heads, measured.kv_heads, measured.head_dim)
