"""The ranks of a cluster as the step solver sees them: what a pass on a set costs, and where to look for sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.planner.cost import LOCAL, Costs, Method, RateByDegree, split_heads
from heteromesh.planner.shards import shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """What a pass on some set of ranks costs, with shards proportional to speed as far as memory allows."""

    speeds: tuple[float, ...]
    room: tuple[int, ...]
    """Tokens that fit each rank."""
    method: Method | None
    """None on one rank."""
    heads: tuple[int, ...]
    """Attention heads per rank where the method splits them, else empty."""
    fixed: float
    per_token: float
    per_square: float
    """seconds = fixed + per_token * tokens + per_square * (sum of squared lengths), while tokens <= even."""
    wire: float
    """Seconds of exchange per token of a shard."""
    even: int
    """Tokens up to which shards proportional to speed fit every rank."""
    most: int
    """Tokens that fit at all."""
    power: float
    """Sum of speeds."""
    costs: Costs

    @property
    def work(self) -> float:
        """Of the method."""
        return self.method.work if self.method else 1.0

    @property
    def method_name(self) -> str:
        return self.method.name if self.method else LOCAL

    def seconds(self, tokens: int, squares: int) -> float:
        """Of a pass over sequences with this many tokens and this sum of squared lengths."""
        if tokens <= self.even:
            return self.fixed + self.per_token * tokens + self.per_square * squares
        worst = 0.0
        for i, share in enumerate(shares(tokens, self.speeds, self.room)):
            part = self.heads[i] / sum(self.heads) if self.heads else share / tokens
            work = self.costs.seconds_per_token2 * squares * part + self.costs.seconds_per_token * share
            worst = max(worst, work * self.work / self.speeds[i] + self.wire * share)
        return self.fixed + worst


class Fleet:
    """Teams of one cost model, remembered; `uniform` when only a team's degree matters."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        same = len(set(costs.speeds)) == 1 and len(set(costs.capacity)) == 1
        self.uniform = same and isinstance(costs.rate, RateByDegree)
        self.wide = self._wide()
        """All ranks, by host and dealt over hosts: ranks that a split pass takes among equally free ones."""
        self.alike = self._groups(list(zip(costs.speeds, costs.capacity, strict=True)))
        """Equal devices."""
        self.near = [] if isinstance(costs.rate, RateByDegree) else self._groups(costs.hosts)
        """Hosts, where they matter."""
        self._teams: dict[object, Team] = {}

    def team(self, ranks: Sequence[int], length: int) -> Team | None:
        """The team of these ranks with the method that is fastest for a sequence of this length; None without one."""
        several = len(self.costs.methods) > 1
        key = (len(ranks) if self.uniform else tuple(sorted(ranks)), length if several else 0)
        if key not in self._teams:
            method = self.costs.method_for(sorted(ranks), length) if len(ranks) > 1 else None
            if len(ranks) > 1 and method is None:
                return None
            self._teams[key] = self._make(sorted(ranks), method)
        return self._teams[key]

    def _make(self, ranks: Sequence[int], method: Method | None) -> Team:
        costs = self.costs
        speeds, room = tuple(costs.speeds[r] for r in ranks), tuple(costs.capacity[r] for r in ranks)
        power, uneven, wire = sum(speeds), 1.0, 0.0
        work = method.work if method else 1.0
        heads: tuple[int, ...] = ()
        if method is not None:
            wire = method.bytes_at(len(ranks)) / costs.rate(ranks)
            if method.heads:
                heads = split_heads(method.heads, speeds)
                uneven = max(h / method.heads * power / v for h, v in zip(heads, speeds, strict=True))
        return Team(
            speeds=speeds,
            room=room,
            method=method,
            heads=heads,
            fixed=costs.seconds_per_pass + (costs.seconds_per_split_pass if method else 0.0),
            per_token=work * costs.seconds_per_token / power + wire * max(speeds) / power,
            per_square=work * costs.seconds_per_token2 * uneven / power,
            wire=wire,
            even=int(min(n / v for n, v in zip(room, speeds, strict=True)) * power + 1e-6),
            most=sum(room),
            power=power,
            costs=costs,
        )

    def _wide(self) -> list[list[int]]:
        every = list(range(self.costs.ranks))
        turn = [self.costs.hosts[:r].count(self.costs.hosts[r]) for r in every]
        # Ranks of one host share its NICs: dealt over hosts, a pass too large for one host may exchange faster.
        spread = sorted(every, key=lambda r: (turn[r], r))
        return [every] if spread == every or isinstance(self.costs.rate, RateByDegree) else [spread, every]

    def _groups(self, keys: Sequence[object]) -> list[list[int]]:
        """Ranks with equal keys; without groups of one rank and of all."""
        groups: dict[object, list[int]] = {}
        for rank, key in enumerate(keys):
            groups.setdefault(key, []).append(rank)
        return [g for g in groups.values() if 1 < len(g) < len(keys)]
