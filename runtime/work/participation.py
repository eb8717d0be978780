"""Which ranks of a job that stay work: all, or those whose work makes steps shorter."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.participation.working import GradientSum, WorkingRanks, choose_working
from heteromesh.runtime.work.sampler import Sampler

SEARCH_SECONDS = 2.0
"""Of processor time, once a run."""


def working_ranks(
    sampler: Sampler, cluster: Cluster, costs: Costs, buckets: Sequence[Bucket], plan_seconds: float
) -> WorkingRanks:
    """Returns who works, judged by the next batch. costs: of all ranks; buckets: of the gradients."""
    batch = copy.copy(sampler).next_batch()
    nbytes = sum(bucket.numel * bucket.dtype.itemsize for bucket in buckets)
    gradients = GradientSum(nbytes=nbytes, buckets=max(1, len(buckets)))
    return choose_working(costs, cluster, batch.lengths, gradients, seconds=SEARCH_SECONDS, plan_seconds=plan_seconds)


def told(chosen: WorkingRanks, cluster: Cluster) -> str:
    """Returns a line for people about the hosts that don't work."""
    idle = sorted(set(range(cluster.ranks)) - set(chosen.ranks))
    hosts = ", ".join(dict.fromkeys(cluster.host_of(rank).name for rank in idle))
    ranks = "rank waits" if len(idle) == 1 else f"{len(idle)} ranks wait"
    return (
        f"hosts that get no work: {hosts}; a step is predicted to take {chosen.seconds:.3g} s without them and "
        f"{chosen.everyone_seconds:.3g} s with all; their {ranks} for the end (idle_hosts=False has them work)"
    )
