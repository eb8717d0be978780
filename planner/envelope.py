"""What the best set of ranks of every degree could do: optimistic for any real set, exact where ranks are alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, combinations

import numpy as np
from numpy.typing import NDArray

from heteromesh.planner.cost import Costs, RateByDegree

Floats = NDArray[np.float64]
PAIRED_HOSTS = 64
"""With more hosts their pairs are not looked at and exchanges between them count as free."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """Per degree that some method splits over (and degree 1), ascending."""

    degree: Floats
    power: Floats
    """Sum of the largest speeds."""
    room: Floats
    """Sum of the largest capacities, tokens."""
    wire: Floats
    """Seconds of exchange per token of a shard, at least."""
    work: Floats
    """Compute relative to that on whole sequences, at least."""
    fixed: Floats
    """Seconds of a pass whatever its tokens."""
    slowest: float
    """Smallest speed."""

    def own_seconds(self, costs: Costs, lengths: Floats) -> Floats:
        """[sequence, degree]: seconds of a pass with that sequence alone, at least; infinite where it doesn't fit."""
        s = lengths[:, None]
        work = (costs.seconds_per_token2 * s * s + costs.seconds_per_token * s) * self.work
        work += self.wire * self.slowest * s
        seconds: Floats = np.where(s <= self.room, work / self.power + self.fixed, math.inf)
        return seconds


def envelope(costs: Costs) -> Envelope:
    """The envelope of a cost model.

    `costs.rate` must depend on the degree alone (RateByDegree), or treat the ranks of a host alike and give no set on
    several hosts a higher rate than the fastest pair of ranks on two hosts.
    """
    n = costs.ranks
    degrees = [d for d in range(1, n + 1) if d == 1 or any(m.fits(d) for m in costs.methods)]
    power = list(accumulate(sorted(costs.speeds, reverse=True)))
    room = list(accumulate(sorted(costs.capacity, reverse=True)))
    rates = _best_rates(costs)
    wire = [min((m.bytes_at(d) for m in costs.methods if m.fits(d)), default=0.0) / rates[d - 1] for d in degrees]
    return Envelope(
        degree=np.array(degrees, float),
        power=np.array([power[d - 1] for d in degrees]),
        room=np.array([room[d - 1] for d in degrees], float),
        wire=np.array([0.0 if d == 1 else w for d, w in zip(degrees, wire, strict=True)]),
        work=np.array([1.0 if d == 1 else min(m.work for m in costs.methods if m.fits(d)) for d in degrees]),
        fixed=np.array([costs.seconds_per_pass + (costs.seconds_per_split_pass if d > 1 else 0.0) for d in degrees]),
        slowest=min(costs.speeds),
    )


def _best_rates(costs: Costs) -> list[float]:
    """By degree - 1: bytes per second that no set of that degree exceeds."""
    if isinstance(costs.rate, RateByDegree):
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
