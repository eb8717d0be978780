"""Steps in which passes that run at the same time share the NICs of their hosts, which the cost model leaves out.

A pass that exchanges for a share e of its seconds asks the NICs of each of its hosts for that share. Where the passes
of the moment ask a NIC for more than all of it, they all slow down in proportion until one of them ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.report.simulate import slowed_seconds

_NOTHING = 1e-12


def shared_nic_seconds(step: Step, costs: Costs, slow: Mapping[int, float]) -> float | None:
    """Returns seconds of the step; None where exchange rates come from a table, which does not say who shares what."""
    if costs.rate.by_degree:
        return None
    left = [slowed_seconds(p, step.batch, costs, slow) for p in step.passes]
    demands = [_demands(p, step, costs, seconds) for p, seconds in zip(step.passes, left, strict=True)]
    queues = [[i for i, p in enumerate(step.passes) if rank in p.ranks] for rank in range(costs.ranks)]
    now, ends = 0.0, [0.0] * costs.ranks
    while any(queues):
        # a pass runs when it is the next of each of its ranks
        heads = [queue[0] for queue in queues if queue]
        running = [i for i in sorted(set(heads)) if heads.count(i) == len(step.passes[i].ranks)]
        paces = _paces(running, demands)
        span = min(left[i] / paces[i] for i in running)
        now += span
        for i in running:
            left[i] -= span * paces[i]
            if left[i] <= _NOTHING * max(1.0, now):
                for rank in step.passes[i].ranks:
                    queues[rank].pop(0)
                    ends[rank] = now
    exposed = costs.traffic.step_seconds(step.passes, ends) - max(ends)
    return now + exposed + costs.seconds_per_step


def _demands(p: Pass, step: Step, costs: Costs, seconds: float) -> dict[int, float]:
    """Returns by host the share of the pass's seconds in which it keeps the host's NICs busy."""
    hosts = {costs.hosts[rank] for rank in p.ranks}
    if len(hosts) < 2:
        return {}
    parts = costs.pass_breakdown(p.ranks, p.method, [step.batch[k] for k in p.sequences], p.shards, p.offload)
    return dict.fromkeys(hosts, parts.exchange / seconds if seconds else 0.0)


def _paces(running: Sequence[int], demands: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Returns by pass its progress per second."""
    asked: dict[int, float] = {}
    for i in running:
        for host, share in demands[i].items():
            asked[host] = asked.get(host, 0.0) + share
    return {i: 1 / max([1.0, *(asked[host] for host in demands[i])]) for i in running}
