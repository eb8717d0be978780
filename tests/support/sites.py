"""Hosts and batches for the tests of placement. Without torch."""

from __future__ import annotations

from heteromesh.planner.stages.hosts import ClusterResources, HostResources
from heteromesh.planner.stages.workload import Workload


def site(first, ranks, *, speed=1.0, memory=80e9, fabric="ib", rdma=20e9, ethernet=2e9, link=100e9):
    speeds = speed if isinstance(speed, tuple) else (speed,) * ranks
    return HostResources(
        ranks=tuple(range(first, first + ranks)),
        speeds=speeds,
        memory=memory,
        memory_rate=2e12,
        link=link,
        fabric=fabric,
        rdma=rdma,
        ethernet=ethernet,
    )


def hosts(*descriptions, **shared):
    """One dict of `site` arguments a host; `ranks` defaults to 1."""
    listed, first = [], 0
    for given in descriptions:
        ranks = given.get("ranks", 1)
        listed.append(site(first, ranks, **shared | {k: v for k, v in given.items() if k != "ranks"}))
        first += ranks
    return ClusterResources(hosts=tuple(listed))


def batch(**changes):
    """A model of 6 layers, 8 micro-batches of 1000 tokens, a second a layer."""
    values = {
        "layers": 6,
        "micro_batches": 8,
        "micro_batch_tokens": 1000.0,
        "layer_seconds": 1.0,
        "head_seconds": 0.0,
        "boundary_bytes": 1e6,
        "layer_parameters": 1_000_000,
        "embedding_parameters": 0,
        "head_parameters": 0,
        "layer_activation_bytes": 1e8,
        "head_activation_bytes": 0.0,
    }
    return Workload(**values | changes)
