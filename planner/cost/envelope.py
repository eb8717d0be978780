"""What the best set of ranks of every degree could do: optimistic for any real set, exact where ranks are alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, combinations

import numpy as np

from heteromesh.planner.cost.passes import Costs, Method
from heteromesh.planner.solver import Floats

PAIRED_HOSTS = 64
"""With more hosts their pairs are not looked at and exchanges between them count as free."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One method (or staying on one rank) over the degrees of an envelope; infinite where it does not fit."""

    work: float
    fixed: Floats
    """Seconds of a pass whatever its tokens, at least."""
    exposed: Floats
    """Seconds of exchange per token of a shard that nothing hides, at least."""
    hidden: Floats
    """Seconds of further exchange per token of the largest shard, at least."""
    latency: Floats
    """The same, whatever the tokens."""
    hides: Floats
    """Share of attention that hides them."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """Per degree that some method splits over (and degree 1), ascending."""

    degree: Floats
    power: Floats
    """Sum of the largest speeds."""
    capacity: Floats
    """Sum of the largest capacities, tokens."""
    ways: tuple[Way, ...]
    slowest: float
    """Smallest speed."""
    exposed: Floats
    """Seconds of exchange per token of a shard that nothing hides, at least."""
    work: Floats
    """Compute relative to that on whole sequences, at least."""
    fixed: Floats
    """Seconds of a pass whatever its tokens."""

    def own_seconds(self, costs: Costs, lengths: Floats) -> Floats:
        """Returns by [sequence, degree] the seconds of a pass with that sequence alone, at least (inf: no room)."""
        s = lengths[:, None]
        best: Floats = np.full((len(lengths), len(self.degree)), math.inf)
        square, linear = costs.seconds_per_token2 * s * s, costs.seconds_per_token * s
        for way in self.ways:
            exposed = way.exposed * self.slowest * s
            work = (square + linear) * way.work + exposed
            seconds = work / self.power + way.fixed
            if way.hidden.any() or way.latency.any():
                # what is not hidden is at least the transfers without the attention that may hide them
                rest = (square * (1 - way.hides) + linear) * way.work + exposed
                waits = way.hidden * s / self.degree + way.latency
                seconds = np.maximum(seconds, rest / self.power + way.fixed + waits)
            best = np.minimum(best, seconds)
        return np.where(s <= self.capacity, best, math.inf)


def envelope(costs: Costs) -> Envelope:
    """Returns the envelope of a cost model.

    `costs.rate` must depend on the degree alone, or treat the ranks of a host alike and give no set on
    several hosts a higher rate than the fastest pair of ranks on two hosts.
    """
    n = costs.ranks
    degrees = [d for d in range(1, n + 1) if d == 1 or any(m.fits(d) for m in costs.methods)]
    power = list(accumulate(sorted(costs.speeds, reverse=True)))
    capacity = list(accumulate(sorted(costs.capacity, reverse=True)))
    rates = _best_rates(costs)
    ways = (_whole(degrees, costs), *(_split(m, degrees, costs, rates) for m in costs.methods))
    exposed, fixed = (np.min([getattr(way, part) for way in ways], axis=0) for part in ("exposed", "fixed"))
    return Envelope(
        degree=np.array(degrees, float),
        power=np.array([power[d - 1] for d in degrees]),
        capacity=np.array([capacity[d - 1] for d in degrees], float),
        ways=ways,
        slowest=min(costs.speeds),
        exposed=exposed,
        work=np.array([1.0 if d == 1 else min(m.work for m in costs.methods if m.fits(d)) for d in degrees]),
        fixed=fixed,
    )


def _whole(degrees: list[int], costs: Costs) -> Way:
    nothing = np.zeros(len(degrees))
    alone = np.array([0.0 if d == 1 else math.inf for d in degrees])
    return Way(
        work=1.0, fixed=costs.seconds_per_pass + alone, exposed=alone, hidden=nothing, latency=nothing, hides=nothing
    )


def _split(method: Method, degrees: list[int], costs: Costs, rates: list[float]) -> Way:
    fixed, exposed, hidden, latency, hides = (np.zeros(len(degrees)) for _ in range(5))
    for i, d in enumerate(degrees):
        if d == 1 or not method.fits(d):
            fixed[i] = exposed[i] = math.inf
            continue
        once, back, last = method.exchanged(d) / rates[(method.inner or d) - 1], method.return_bytes(d), 0.0
        if method.overlap == "rounds":
            last = method.exposed_return_share(d)
        moved = method.hop_bytes(d) + back * (1 - last)
        before, under = (n * costs.seconds_per_round for n in method.messages(d))
        fixed[i] = costs.seconds_per_pass + costs.seconds_per_split_pass + before
        fixed[i] += method.extra_tiles(d) * costs.seconds_per_tile
        exposed[i] = back * last / rates[d - 1] + (once if method.overlap != "own" else 0.0)
        hidden[i] = moved / rates[d - 1] + (once if method.overlap == "own" else 0.0)
        latency[i], hides[i] = under, method.hidden_share(d)
    return Way(work=method.work, fixed=fixed, exposed=exposed, hidden=hidden, latency=latency, hides=hides)


def _best_rates(costs: Costs) -> list[float]:
    """Returns by degree - 1 the bytes per second that no set of that degree exceeds."""
    if costs.rate.by_degree:
        return [math.inf, *(costs.rate(range(d)) for d in range(2, costs.ranks + 1))]
    members: dict[int, list[int]] = {}
    for rank, host in enumerate(costs.hosts):
        members.setdefault(host, []).append(rank)
    across = 0.0
    if len(members) > PAIRED_HOSTS:
        across = math.inf
    elif len(members) > 1:
        across = max(costs.rate(sorted((a[0], b[0]))) for a, b in combinations(members.values(), 2))
    inside = [[costs.rate(m[:d]) for m in members.values() if len(m) >= d] for d in range(2, costs.ranks + 1)]
    return [math.inf, *(max([across, *rates]) for rates in inside)]
