"""How much of the optimizer's state each rank has memory for."""

from __future__ import annotations

from heteromesh.planner.cluster.cluster import Cluster

SHARE = 0.5
"""Of what parameters and gradients leave free; the other half is for activations and what fragments."""


def largest_fractions(
    cluster: Cluster, *, parameter_bytes: float, state_bytes: float, granule: float = 0.0
) -> tuple[float, ...]:
    """Returns by rank the largest part of all optimizer state that fits beside whole parameters and gradients; at
    most 1.

    Args:
        cluster: whose devices' memory counts.
        parameter_bytes: of the whole model; gradients are as large, and every rank holds both.
        state_bytes: of the whole model's optimizer state.
        granule: of the state of the largest parameter that has one owner, by which a rank may own too much.
    """
    if state_bytes <= 0:
        return (1.0,) * cluster.ranks
    free = (cluster.device_of(rank).memory_gb * 1e9 - 2 * parameter_bytes for rank in range(cluster.ranks))
    return tuple(min(1.0, max(0.0, (SHARE * capacity - granule) / state_bytes)) for capacity in free)
