"""Who reduces what: the fraction f_i of a tensor that each rank owns, sums for all and hands out again.

Of a tensor of S bytes on H hosts, host h with fraction F_h (the sum over its ranks) sends the others' parts,
S (1 - F_h), and the results of its own part to H - 1 hosts, S F_h (H - 1): in all S (1 + (H - 2) F_h), and it receives
as much. The linear program

    minimise T   subject to   1 + (H - 2) F_h <= T B_h,   sum of f_i = 1,   0 <= f_i <= limit_i

(B_h: the host's bytes per second each way) is solved exactly by filling hosts up to what T lets them own. A ring moves
2 S (n - 1) / n over every link, however slow; a slow host that owns nothing moves S, and no all-reduce can move less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.ownership.ownership import split_bounds

RING_MARGIN = 0.05
"""The ring stays where owners are predicted to gain no more than this: it is one call into gloo."""
OWNER_LOAD = 0.9
"""Of the predicted time, how long an owner's links may be busy while few owners work at a time."""
FEWEST_OWNERS = 2
"""That work at a time. One alone was no faster and varied more (2 x 1 Gbit/s + 2 x 200 Mbit/s)."""
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """Which rank reduces what, and what that is predicted to take (seconds per byte of the tensor)."""

    hosts: tuple[int, ...]
    """Per rank, its host."""
    fractions: tuple[float, ...]
    """Per rank; sums to 1."""
    seconds_per_byte: float
    """An all-reduce with these owners: the busiest link, each way."""
    bound_seconds_per_byte: float
    """No all-reduce is faster: every host must send its contribution and receive the result."""
    ring_seconds_per_byte: float
    """A ring in rank order."""
    waves: tuple[int, ...] = ()
    """Per rank, when its part has its turn: parts of a wave at the same time, waves in order; empty: all at once."""

    @property
    def ring(self) -> bool:
        """Whether a ring is predicted to be as good."""
        return self.ring_seconds_per_byte <= self.seconds_per_byte * (1 + RING_MARGIN)

    @property
    def all_reduce_seconds_per_byte(self) -> float:
        """Of the way that is taken: the ring's or the owners'."""
        return self.ring_seconds_per_byte if self.ring else self.seconds_per_byte

    def bounds(self, numel: int) -> tuple[int, ...]:
        """Returns size + 1 offsets into so many elements: rank i owns [bounds[i], bounds[i + 1]), maybe nothing."""
        return split_bounds(self.fractions, numel)


def plan_reduction(
    hosts: Sequence[int],
    uplinks: Sequence[float],
    local: Sequence[float],
    *,
    max_fraction: Sequence[float] | None = None,
    in_waves: bool = True,
) -> Reduction:
    """Returns the fractions that make the busiest link's time least and, among those, are the most even.

    Args:
        hosts: per rank, its host.
        uplinks: per host, bytes per second each way between it and the other hosts (unused where there is one host).
        local: per host, bytes per second each way between a device and the others of its host.
        max_fraction: per rank, the largest fraction it has memory for; None: no limits.
        in_waves: whether to find out when each part has its turn; the seconds don't depend on it.

    Raises UserError for rates that are not positive and for limits that leave part of the tensor without an owner.
    """
    limits = [1.0] * len(hosts) if max_fraction is None else [min(m, 1.0) for m in max_fraction]
    _check(hosts, uplinks, local, limits)
    members = {h: [r for r, host in enumerate(hosts) if host == h] for h in sorted(set(hosts))}
    capacities = {h: sum(limits[r] for r in ranks) for h, ranks in members.items()}
    caps = capacities if len(members) < 3 else _caps({h: uplinks[h] for h in members}, capacities)
    fractions = _even(members, limits, caps)
    rates = {h: (uplinks[h] if len(members) > 1 else math.inf, local[h]) for h in members}
    seconds = max(_seconds(members, fractions, h, *rate) for h, rate in rates.items())
    slowest = min(rate if len(members) > 1 else inside for rate, inside in rates.values())
    return Reduction(
        hosts=tuple(hosts),
        fractions=tuple(fractions),
        seconds_per_byte=seconds,
        bound_seconds_per_byte=1 / slowest if len(hosts) > 1 else 0.0,
        ring_seconds_per_byte=max(_ring(hosts, h, *rate) for h, rate in rates.items()),
        waves=_waves(members, fractions, rates, seconds) if in_waves else (),
    )


def reduction_for(cluster: Cluster, *, max_fraction: Sequence[float] | None = None, in_waves: bool = True) -> Reduction:
    """Returns the reduction over all ranks of a cluster, at the rates of its links."""
    links = cluster_links(cluster)
    hosts = range(len(cluster.hosts))
    uplinks = [links.uplink(host, hosts) for host in hosts]
    return plan_reduction(links.hosts, uplinks, links.link, max_fraction=max_fraction, in_waves=in_waves)


def _check(hosts: Sequence[int], uplinks: Sequence[float], local: Sequence[float], limits: Sequence[float]) -> None:
    if not hosts or len(limits) != len(hosts):
        raise ValueError(f"{len(limits)} limits for {len(hosts)} ranks: give one a rank, and at least one rank")
    for name, rates in (("uplink", uplinks if len(set(hosts)) > 1 else ()), ("local rate", local)):
        for host, rate in enumerate(rates):
            if not 0 < rate < math.inf:
                raise UserError(f"the {name} of host {host} is {rate} bytes/s: it must be a positive number")
    if not all(limit >= 0 for limit in limits):
        raise UserError(f"the largest fractions are {list(limits)}: none may be negative")
    if sum(limits) < 1 - _NOTHING:
        raise UserError(
            f"the ranks have memory for {sum(limits):.3f} of the tensor's shards in all: they need 1, so give a rank "
            "more memory or take more ranks"
        )


def _caps(uplinks: dict[int, float], capacities: dict[int, float]) -> dict[int, float]:
    """Returns by host (three or more) the largest fraction it may own in the least possible time."""
    others = len(uplinks) - 2

    def caps(seconds: float) -> dict[int, float]:
        # a tiny negative is the slowest host's zero
        return {h: min(capacities[h], max(0.0, (seconds * rate - 1) / others)) for h, rate in uplinks.items()}

    low = max(1 / rate for rate in uplinks.values())
    if sum(caps(low).values()) >= 1:
        return caps(low)
    # what fits grows with time along straight lines, bent where a host's room is full
    for high in sorted((1 + others * capacities[h]) / rate for h, rate in uplinks.items()):
        if high <= low:
            continue
        fit_low, fit_high = sum(caps(low).values()), sum(caps(high).values())
        if fit_high >= 1:
            return caps(low + (high - low) * (1 - fit_low) / (fit_high - fit_low))
        low = high
    return caps(low)  # the rooms add up to 1, but for rounding


def _even(members: dict[int, list[int]], limits: Sequence[float], caps: dict[int, float]) -> list[float]:
    """Returns the most even fractions under limits of ranks and of hosts (water filling; hosts above their cap get the
    cap).
    """
    fractions = [0.0] * len(limits)
    free, left = dict(members), 1.0
    while free:
        ranks = [r for mine in free.values() for r in mine]
        filled = dict(zip(ranks, _fill([limits[r] for r in ranks], left), strict=True))
        full = [h for h, mine in free.items() if sum(filled[r] for r in mine) > caps[h] + _NOTHING]
        for host in full:
            mine = free.pop(host)
            filled.update(zip(mine, _fill([limits[r] for r in mine], caps[host]), strict=True))
            left -= caps[host]
        for rank in ranks:
            fractions[rank] = filled[rank] if filled[rank] > _NOTHING else 0.0
        if not full:
            break
    return fractions


def _fill(limits: Sequence[float], total: float) -> list[float]:
    """Returns the most even amounts under these limits that add up to the total (or all limits, where they don't reach
    it).
    """
    amounts = [0.0] * len(limits)
    left = total
    for done, i in enumerate(sorted(range(len(limits)), key=lambda i: limits[i])):
        amounts[i] = min(limits[i], left / (len(limits) - done))
        left -= amounts[i]
    return amounts


def _seconds(members: dict[int, list[int]], fractions: Sequence[float], host: int, rate: float, inside: float) -> float:
    """Returns the seconds a byte of the host's uplink, or the busiest device's link inside it."""
    owned = [fractions[r] for r in members[host]]
    across = (1 + (len(members) - 2) * sum(owned)) / rate
    if len(owned) == 1:
        return across
    # a device stands for its own part and an even share of those that other hosts own
    busiest = max(owned) + (1 - sum(owned)) / len(owned)
    return max(across, (1 + (len(owned) - 2) * busiest) / inside)


def _waves(
    members: dict[int, list[int]], fractions: Sequence[float], rates: dict[int, tuple[float, float]], seconds: float
) -> tuple[int, ...]:
    """Returns the most waves in which no link is busier than it is with all owners at once.

    A slow host then has few connections under way, which share its link more evenly than many: with the parts of six
    owners at once the least lucky connection kept the others waiting.
    """
    places = {r: i for ranks in members.values() for i, r in enumerate(ranks)}
    owners = sorted((r for r, f in enumerate(fractions) if f), key=lambda r: (-round(fractions[r], 6), places[r], r))
    for count in range(len(owners) // FEWEST_OWNERS, 1, -1):
        waves = [0] * len(fractions)
        for i, owner in enumerate(owners):
            waves[owner] = i * count // len(owners)
        if all(_fits(members, _alone(fractions, waves, wave), rates, seconds) for wave in range(count)):
            return tuple(waves)
    return (0,) * len(fractions)


def _alone(fractions: Sequence[float], waves: Sequence[int], wave: int) -> list[float]:
    """Returns the fractions of a wave's own bytes."""
    total = sum(f for f, its in zip(fractions, waves, strict=True) if its == wave)
    return [f / total if its == wave else 0.0 for f, its in zip(fractions, waves, strict=True)]


def _fits(
    members: dict[int, list[int]], fractions: Sequence[float], rates: dict[int, tuple[float, float]], seconds: float
) -> bool:
    for host, ranks in members.items():
        limit = seconds * (OWNER_LOAD if any(fractions[r] for r in ranks) else 1 + _NOTHING)
        if _seconds(members, fractions, host, *rates[host]) > limit:
            return False
    return True


def _ring(hosts: Sequence[int], host: int, rate: float, inside: float) -> float:
    size = len(hosts)
    moved = 2 * (size - 1) / size
    here = [r for r in range(size) if hosts[r] == host]
    leaving = sum(hosts[(r + 1) % size] != host for r in here)
    return max(moved * leaving / rate, moved / inside if leaving < len(here) else 0.0)
