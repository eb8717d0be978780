"""The ranks of a cluster as the step solver sees them: what a pass on a set costs, and where to look for sets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from heteromesh.planner.cost.passes import FORWARD, LOCAL, Costs, Load, Method, dealt_pairs
from heteromesh.planner.cost.shards import shares

SIZE = 1 << 20
"""More than ranks."""
PROBES = 2
"""Lengths per doubling at which methods are compared: one that is best at none of them is not looked at again."""


class Line(NamedTuple):
    """Seconds of a pass as fixed + per_token * tokens + per_square * (sum of squared lengths)."""

    fixed: float
    per_token: float
    per_square: float

    def at(self, tokens: float, squares: float) -> float:
        """Returns the seconds."""
        return self.fixed + self.per_token * tokens + self.per_square * squares


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetCost:
    """What a pass on some set of ranks costs, with shards proportional to speed as far as memory allows."""

    ranks: tuple[int, ...]
    """Those that it was made of; others with equal speeds, memories and links have the same costs."""
    speeds: tuple[float, ...]
    method: Method | None
    """None on one rank."""
    lines: tuple[Line, ...]
    """seconds = the largest of these, while tokens <= even."""
    exposed: float
    """Seconds of exchange per token of a shard that nothing hides."""
    even: int
    """Tokens up to which shards proportional to speed fit every rank."""
    resident: int
    """What `even` is without moving activations to host memory."""
    most: int
    """Tokens that fit at all."""
    power: float
    """Sum of speeds."""
    costs: Costs

    @property
    def method_name(self) -> str:
        return self.method.name if self.method else LOCAL

    def seconds(self, tokens: int, squares: int) -> float:
        """Returns the seconds of a pass over sequences with this many tokens and this sum of squared lengths."""
        if tokens > self.even:
            return self._uneven(tokens, squares)
        first = self.lines[0]
        seconds = first.fixed + first.per_token * tokens + first.per_square * squares
        if len(self.lines) > 1:
            seconds = max(seconds, *(line.at(tokens, squares) for line in self.lines[1:]))
        return seconds

    def _uneven(self, tokens: int, squares: int) -> float:
        """Returns `seconds` where some rank's memory is full."""
        capacity = self.costs.capacity_for(self.ranks, self.method, tokens)
        dealt = shares(tokens, self.speeds, capacity)
        load = Load(dealt, [squares * n / tokens for n in dealt], 1)
        offload = self.costs.offload_ratio(self.ranks, self.method, dealt)
        return self.costs.priced(self.ranks, self.method, load, offload).seconds


class RankSetCache:
    """Costs of sets of one cost model, remembered; `uniform` when only a set's degree matters."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        same = len(set(costs.speeds)) == 1 and len(set(costs.capacity)) == 1
        self.uniform = same and costs.rate.by_degree
        self.wide = self._wide()
        """All ranks, by host and dealt over hosts: ranks that a split pass takes among equally free ones."""
        self.alike = self._groups(list(zip(costs.speeds, costs.capacity, strict=True)))
        """Equal devices."""
        self.near = [] if costs.rate.by_degree else self._groups(costs.hosts)
        """Hosts, where they matter."""
        self._found: dict[object, tuple[RankSetCost, ...]] = {}
        self._places, self._kinds = _places(costs)

    def find(self, ranks: Sequence[int], length: int) -> RankSetCost | None:
        """Returns the costs of these ranks with the method that is fastest for a sequence of this length; None without
        one.

        Its `ranks` may be others that are alike.
        """
        key = self._key(ranks)
        candidates = self._found.get(key)
        if candidates is None:
            candidates = self._found[key] = self._make_all(sorted(ranks))
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        fitting = [t for t in candidates if t.most >= length] or [max(candidates, key=lambda t: t.most)]
        return min(fitting, key=lambda t: t.seconds(min(length, t.most), length * length))

    def _key(self, ranks: Sequence[int]) -> object:
        if self.uniform:
            return len(ranks)
        if not self._kinds:
            return tuple(sorted(ranks))
        # ranks of one kind are on one host: how many of which kinds says what the set is
        counts = Counter([self._places[r] for r in ranks])
        return tuple(sorted([self._kinds[place] * SIZE + n for place, n in counts.items()]))

    def _make_all(self, ranks: Sequence[int]) -> tuple[RankSetCost, ...]:
        """Returns the costs of one method each, without those that are never the fastest."""
        if len(ranks) == 1:
            return (self._make(ranks, None),)
        candidates = [self._make(ranks, m) for m in self.costs.methods if m.fits(len(ranks))]
        if len(candidates) < 2:
            return tuple(candidates)
        most = max(t.even for t in candidates)
        lengths = {int(most * 2 ** (-i / PROBES)) for i in range(PROBES * max(1, most.bit_length()))}
        best = {min(range(len(candidates)), key=lambda i: _or_never(candidates[i], n)) for n in lengths if n}
        best.add(max(range(len(candidates)), key=lambda i: candidates[i].most))
        return tuple(candidates[i] for i in sorted(best))

    def _make(self, ranks: Sequence[int], method: Method | None) -> RankSetCost:
        costs = self.costs
        speeds = tuple(costs.speeds[r] for r in ranks)
        power, degree, work, exposed = sum(speeds), len(ranks), 1.0, 0.0
        fixed, uneven = costs.seconds_per_pass, 1.0
        if method is not None:
            comm, work = costs.comm_cost(ranks, method, speeds), method.work
            exposed = comm.exposed
            fixed += costs.seconds_per_split_pass + comm.exposed_latency
            fixed += method.extra_tiles(degree) * costs.seconds_per_tile
            if method.heads or method.overlap == "rounds":
                pairs = dealt_pairs(method, Load(speeds, speeds, 1), speeds)
                uneven = max(p / v for p, v in zip(pairs, speeds, strict=True))
        largest = max(speeds) / power
        token = work * costs.seconds_per_token / power + exposed * largest
        square = work * costs.seconds_per_token2 * uneven / power
        lines = [Line(fixed, token, square)]
        if method is not None and (comm.hidden or comm.hidden_latency):
            # the transfers take longer than what hides them
            lines.append(Line(fixed + comm.hidden_latency, token + comm.hidden * largest, square * (1 - comm.hides)))
        held = method.held if method else 0.0
        capacity = [costs.capacity[r] for r in ranks]

        def even(capacity: Sequence[int]) -> int:
            most = min(n / (held + (1 - held) * v / power) for n, v in zip(capacity, speeds, strict=True))
            # where others' keys take room, rooms are rounded down
            return int(most + 1e-6) if not held else max(0, int(most) - degree)

        return RankSetCost(
            ranks=tuple(ranks),
            speeds=speeds,
            method=method,
            lines=(*lines, *_moving(costs, ranks, lines[0], largest)),
            exposed=exposed,
            even=even(capacity),
            resident=even([costs.resident[r] for r in ranks]) if costs.resident else even(capacity),
            most=max(0, int(sum(capacity) / (1 + held * (degree - 1))) - degree) if held else sum(capacity),
            power=power,
            costs=costs,
        )

    def _wide(self) -> list[list[int]]:
        every = list(range(self.costs.ranks))
        turn = [self.costs.hosts[:r].count(self.costs.hosts[r]) for r in every]
        # Ranks of one host share its NICs: dealt over hosts, a pass too large for one host may exchange faster.
        spread = sorted(every, key=lambda r: (turn[r], r))
        return [every] if spread == every or self.costs.rate.by_degree else [spread, every]

    def _groups(self, keys: Sequence[object]) -> list[list[int]]:
        """Returns ranks with equal keys; without groups of one rank and of all."""
        groups: dict[object, list[int]] = {}
        for rank, key in enumerate(keys):
            groups.setdefault(key, []).append(rank)
        return [g for g in groups.values() if 1 < len(g) < len(keys)]


def _or_never(rank_set: RankSetCost, length: int) -> float:
    return rank_set.seconds(length, length * length) if length <= rank_set.most else math.inf


def _moving(costs: Costs, ranks: Sequence[int], compute: Line, largest: float) -> list[Line]:
    """Returns lines of a pass whose activations exceed the devices' memory: the excess moves to the hosts and back."""
    if not costs.resident:
        return []
    slowest = max(ranks, key=lambda r: costs.offload_seconds[r])
    each, resident = costs.offload_seconds[slowest], costs.resident[slowest]
    if not each:
        return []
    out = Line(-each * resident, each * largest, 0.0)
    return [
        Line(*(x * (1 - FORWARD) + y for x, y in zip(compute, out, strict=True))),
        Line(*(2 * y for y in out)),
    ]


def _places(costs: Costs) -> tuple[list[int], list[int]]:
    """Returns (per rank its place, per place its kind): equal devices of a host are one place, equal places are of one
    kind.

    Empty where links are not known; known ones depend on nothing else. So do they where a host's devices differ: then
    every host is a kind.
    """
    if costs.rate.by_degree:
        return [], []
    devices: dict[int, set[tuple[float, int]]] = {}
    for host, speed, capacity in zip(costs.hosts, costs.speeds, costs.capacity, strict=True):
        devices.setdefault(host, set()).add((speed, capacity))
    places: dict[object, int] = {}
    numbers: dict[object, int] = {}
    own, kinds = [], []
    for host, speed, capacity in zip(costs.hosts, costs.speeds, costs.capacity, strict=True):
        place = (host, speed, capacity)
        if place not in places:
            places[place] = len(places)
            kind = (speed, capacity, costs.rate.host_key(host), host if len(devices[host]) > 1 else None)
            kinds.append(numbers.setdefault(kind, len(numbers)))
        own.append(places[place])
    return own, kinds
