"""First version: longest first, each sequence where it ends earliest."""

from __future__ import annotations

from collections.abc import Sequence

from heteromesh.planner.cost import LOCAL, Costs
from heteromesh.planner.plan import Pass
from heteromesh.planner.shards import make_pass


def greedy(batch: Sequence[int], costs: Costs) -> list[Pass]:
    """A feasible pass list, longest sequences first."""
    free = [0.0] * costs.ranks
    split: list[Pass] = []
    bins: list[tuple[int, list[int]]] = []
    last: dict[int, int] = {}
    for k in sorted(range(len(batch)), key=lambda k: (-batch[k], k)):
        best: tuple[float, int, Pass] | None = None
        order = sorted(range(costs.ranks), key=lambda r: (free[r], r))
        for degree in range(1, costs.ranks + 1):
            team = order[:degree] if not last or degree == 1 else []
            if degree == 1:
                team = next(([r] for r in order if costs.capacity[r] >= batch[k]), [])
            method = costs.method_for(sorted(team), batch[k]) if degree > 1 and team else None
            if not team or sum(costs.capacity[r] for r in team) < batch[k] or (degree > 1 and method is None):
                continue
            p = make_pass(team, method.name if method else LOCAL, [k], batch, costs)
            end = max(free[r] for r in team) + p.seconds
            if best is None or (end, degree) < best[:2]:
                best = (end, degree, p)
        if best is None:
            order = sorted(range(costs.ranks), key=lambda r: -costs.capacity[r])
            degree = next(
                d
                for d in range(2, costs.ranks + 1)
                if sum(costs.capacity[r] for r in order[:d]) >= batch[k] and costs.method_for(order[:d], batch[k])
            )
            method = costs.method_for(sorted(order[:degree]), batch[k])
            assert method is not None
            p = make_pass(order[:degree], method.name, [k], batch, costs)
            best = (max(free[r] for r in p.ranks) + p.seconds, degree, p)
        end, degree, p = best
        if degree > 1:
            split.append(p)
        else:
            rank = p.ranks[0]
            at = last.get(rank)
            if at is not None and sum(batch[i] for i in bins[at][1]) + batch[k] <= costs.capacity[rank]:
                bins[at][1].append(k)
                end = free[rank] + p.seconds - costs.seconds_per_pass
            else:
                last[rank] = len(bins)
                bins.append((rank, [k]))
        for r in p.ranks:
            free[r] = end
    return split + [make_pass([r], LOCAL, ks, batch, costs) for r, ks in bins]
