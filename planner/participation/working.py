"""Which hosts of a running job work, by costs that were measured; the others would make steps longer.

A candidate is a number of hosts of each kind, the fastest first; the first rank's host always works, as it plans and
writes. Its seconds are the passes of a batch on its ranks and what they don't hide of the gradient sum over them
(planner/cost/overlap.py). Candidates have their turn in the order of all work over the sum of speeds, until the next
can't be better than the best; one that can't with its gradient sum is not planned.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import Links
from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.reduction.nics import over_one_nic
from heteromesh.planner.sequences.step import plan_step

WORTHWHILE = 0.1
"""Of a step's seconds: hosts are left out where they cost more than this."""
CANDIDATES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingRanks:
    """Who works, and what a step takes so and with everyone."""

    ranks: tuple[int, ...]
    seconds: float
    everyone_seconds: float
    """Infinite where nothing could be planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSum:
    """What the ranks of a job sum once a step."""

    nbytes: int
    buckets: int
    """It travels in so many parts."""

    def traffic(self, cluster: Cluster) -> StepTraffic:
        """Returns the seconds of the busiest link for the ranks of a cluster."""
        if cluster.ranks == 1:
            return StepTraffic()
        per_byte = over_one_nic(cluster, in_waves=False).all_reduce_seconds_per_byte
        return StepTraffic(reduce_seconds=self.nbytes * per_byte, chunks=self.buckets)


def choose_working(
    costs: Costs, cluster: Cluster, batch: Sequence[int], gradients: GradientSum, *, seconds: float, plan_seconds: float
) -> WorkingRanks:
    """Returns who works.

    Args:
        costs: of all ranks of the cluster.
        batch: lengths of a usual step, in tokens.
        gradients: what is summed.
        seconds: of processor time for the search, at most; everyone is planned for in any case.
        plan_seconds: of processor time for a plan.
    """
    began, everyone = time.thread_time(), tuple(range(cluster.ranks))

    def planned(ranks: Sequence[int], traffic: StepTraffic) -> float:
        own = replace(working_costs(costs, ranks), traffic=traffic, seconds_per_step=0.0)
        try:
            return plan_step(batch, own, time_limit=plan_seconds).seconds
        except UserError:
            return math.inf

    best = all_of_them = planned(everyone, gradients.traffic(cluster))
    chosen, work = everyone, _work(costs, batch)
    waiting = [(work / sum(costs.speeds[r] for r in ranks), ranks) for ranks in _candidates(costs, cluster)]
    heapq.heapify(waiting)
    while waiting and time.thread_time() - began < seconds:
        passes, ranks = heapq.heappop(waiting)
        limit = min(best, all_of_them * (1 - WORTHWHILE))
        if passes >= limit:
            break
        traffic = gradients.traffic(cluster.subset(ranks))
        if ranks != everyone and traffic.at_least(passes) < limit and (took := planned(ranks, traffic)) < best:
            best, chosen = took, ranks
    if best > all_of_them * (1 - WORTHWHILE):
        best, chosen = all_of_them, everyone
    return WorkingRanks(ranks=chosen, seconds=best, everyone_seconds=all_of_them)


def working_costs(costs: Costs, ranks: Sequence[int]) -> Costs:
    """Returns the costs of these ranks, ascending, numbered from 0; hosts keep their numbers."""
    rate = costs.rate
    if isinstance(rate, Links):
        rate = replace(rate, hosts=tuple(rate.hosts[r] for r in ranks))
    return replace(
        costs,
        speeds=tuple(costs.speeds[r] for r in ranks),
        capacity=tuple(costs.capacity[r] for r in ranks),
        hosts=tuple(costs.hosts[r] for r in ranks),
        rate=rate,
        offload_seconds=tuple(costs.offload_seconds[r] for r in ranks if costs.offload_seconds),
        resident=tuple(costs.resident[r] for r in ranks if costs.resident),
        step_capacity=tuple(costs.step_capacity[r] for r in ranks if costs.step_capacity),
        methods=costs.methods if len(ranks) > 1 else (),
    )


def _work(costs: Costs, batch: Sequence[int]) -> float:
    """Returns the seconds of the whole batch at the reference speed, at least."""
    work = costs.seconds_per_token2 * sum(n * n for n in batch) + costs.seconds_per_token * sum(batch)
    return work * min([1.0, *(m.work for m in costs.methods)])


def _candidates(costs: Costs, cluster: Cluster) -> Iterator[tuple[int, ...]]:
    """Yields the ranks of every number of hosts of each kind, the fastest of them; all of them with rank 0's."""
    own = [[r for r, h in enumerate(cluster.rank_hosts) if h == host] for host in range(len(cluster.hosts))]
    kinds: dict[object, list[int]] = {}
    for number, host in enumerate(cluster.hosts[1:], 1):
        kinds.setdefault((host.device, host.count, host.fabric, host.nics), []).append(number)
    for hosts in kinds.values():
        hosts.sort(key=lambda h: -sum(costs.speeds[r] for r in own[h]))
    counts = itertools.product(*(range(len(hosts), -1, -1) for hosts in kinds.values()))
    for numbers in itertools.islice(counts, CANDIDATES):
        chosen = [h for hosts, n in zip(kinds.values(), numbers, strict=True) for h in hosts[:n]]
        yield tuple(sorted(r for h in (0, *chosen) for r in own[h]))
