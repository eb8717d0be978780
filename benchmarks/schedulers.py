"""Two published schedulers, written from their descriptions, as peers for benchmarks/planner.py.

Both cut a batch into micro-batches that all ranks run in lock step, give every sequence a group of a power-of-two
number of ranks, and are judged with the same cost model as our steps: a micro-batch takes as long as its slowest group.
For ranks that are alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.cost.ranksets import RankSetCache

MORE_MICRO_BATCHES = 4
"""FlexSP tries this many numbers of micro-batches from the smallest on (its training script's value)."""


@dataclass(slots=True)
class Group:
    """Ranks that work through some sequences in one micro-batch."""

    degree: int
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0
    load: float = 0.0

    def add(self, length: int, load: float) -> None:
        self.lengths.append(length)
        self.tokens += length
        self.load += load


class Peers:
    """The schedulers under one cost model."""

    def __init__(self, costs: Costs) -> None:
        self.costs, self.ranks, self.room = costs, costs.ranks, costs.capacity[0]
        rank_sets = RankSetCache(costs)
        self.degrees = [2**i for i in range(self.ranks.bit_length()) if 2**i <= self.ranks]
        teams = [rank_sets.find(range(d), 1) for d in self.degrees]
        self.teams = {d: team for d, team in zip(self.degrees, teams, strict=True) if team is not None}

    def seconds(self, length: int, degree: int) -> float:
        """A sequence's own part of a group's time."""
        team = self.teams[degree]
        return team.lines[0].per_token * length + team.lines[0].per_square * length * length

    def flexsp(self, lengths: Sequence[int]) -> float:
        """Seconds of a step by FlexSP (arXiv 2412.01523, section 4 and appendix A).

        Sorted sequences in consecutive micro-batches of even tokens; every micro-batch planned on its own. Its integer
        program (a bucketed approximation with a time limit of seconds) is replaced by a fast heuristic on exact lengths
        that also uses single ranks, which the published code leaves out.
        """
        ordered = sorted(lengths)
        fewest = math.ceil(sum(ordered) / (self.room * self.ranks))
        best = math.inf
        for count in range(fewest, len(ordered) + 1):
            if count >= fewest + MORE_MICRO_BATCHES and best < math.inf:
                break
            parts = even_parts(ordered, count)
            best = min(best, sum(self.micro_batch(part) for part in parts))
        return best

    def micro_batch(self, lengths: Sequence[int]) -> float:
        """Seconds of the best groups found for sequences that run at once; infinite if they don't fit."""
        low = sum(min(d * self.seconds(n, d) for d in self._fitting(n)) for n in lengths) / self.ranks
        low = max(low, *(min(self.seconds(n, d) for d in self._fitting(n)) for n in lengths))
        best = math.inf
        for least, join in product(self.degrees, (True, False)):
            target = low
            while target < min(best, 4 * low):
                best = min(best, self._pack(lengths, target, least, join))
                target *= 1.03
        return best + self.teams[1].lines[0].fixed

    def megatron(self, lengths: Sequence[int]) -> float:
        """Seconds of a step by Megatron's next_hdp_group_packing_aware (dev branch, 2026-06), from its description.

        The longest sequence gets the fewest ranks that hold it; 1.05 times its length^2 / ranks caps every group; then
        each next one goes where the largest load stays smallest, on a group or on free ranks, else to the next
        micro-batch. Ranks left over double the smallest group. Where several places are as good the description is
        silent: the better of the fullest group and the emptiest, fewest ranks first.
        """
        return min(self._megatron(lengths, fullest) for fullest in (True, False))

    def _megatron(self, lengths: Sequence[int], fullest: bool) -> float:
        left, total = sorted(lengths, reverse=True), 0.0
        while left:
            groups, left = self._megatron_groups(left, fullest)
            total += max(self._group_seconds(g) for g in groups)
        return total

    def _megatron_groups(self, ordered: Sequence[int], fullest: bool) -> tuple[list[Group], list[int]]:
        groups: list[Group] = []
        later: list[int] = []
        free, cap = self.ranks, ordered[0] * self.room * 1.05
        for length in ordered:
            peak = max((g.load for g in groups), default=0.0)
            options = []
            for degree in self._fitting(length):
                load = length * length / degree
                for i, g in enumerate(groups):
                    if g.degree == degree and g.tokens + length <= degree * self.room:
                        options.append((max(peak, g.load + load), degree, -g.tokens if fullest else g.tokens, i))
                if degree <= free:
                    options.append((max(peak, load), degree, 0, -1))
            options = [o for o in options if o[0] <= cap] if groups else [min(options, key=lambda o: o[1])]
            if not options:
                later.append(length)
                continue
            _, degree, _, i = min(options)
            if i < 0:
                groups.append(Group(degree))
                free -= degree
            groups[i].add(length, length * length / degree)
        return self._filled(groups, free), later

    def _filled(self, groups: list[Group], free: int) -> list[Group]:
        while free:
            able = [g for g in groups if g.degree <= free]
            if not able:
                break
            smallest = min(able, key=lambda g: (g.degree, -g.load))
            free -= smallest.degree
            smallest.degree *= 2
        return groups

    def _group_seconds(self, group: Group) -> float:
        return self.teams[group.degree].lines[0].fixed + sum(self.seconds(n, group.degree) for n in group.lengths)

    def _fitting(self, length: int) -> list[int]:
        return [d for d in self.degrees if length <= d * self.room]

    def _pack(self, lengths: Sequence[int], target: float, least: int, join: bool) -> float:
        """Longest first, each where it wastes least rank time; the largest load, infinite if one finds no place.

        New groups have `least` ranks or more while there are as many; `join`: an open group before a new one.
        """
        groups: list[Group] = []
        free = self.ranks
        for length in sorted(lengths, reverse=True):
            fitting = self._fitting(length)
            own = {d: self.seconds(length, d) for d in fitting}
            joined = [
                (g.degree * own[g.degree], g.degree * self.room - g.tokens, i)
                for i, g in enumerate(groups)
                if g.degree in own and g.load + own[g.degree] <= target and g.tokens + length <= g.degree * self.room
            ]
            fresh = [d for d in fitting if d <= free and own[d] <= target]
            if not joined and not fresh:
                return math.inf
            if joined and (join or not fresh):
                i = min(joined)[2]
            else:
                i = len(groups)
                groups.append(Group(next((d for d in fresh if d >= least), fresh[-1])))
                free -= groups[i].degree
            groups[i].add(length, own[groups[i].degree])
        return self._widened(groups, free)

    def _widened(self, groups: list[Group], free: int) -> float:
        """The largest load after free ranks double the slowest group, as long as they can."""
        while True:
            slowest = max(groups, key=lambda g: g.load)
            wider = sum(self.seconds(n, 2 * slowest.degree) for n in slowest.lengths) if slowest.degree <= free else 0
            if slowest.degree > free or wider >= slowest.load:
                return slowest.load
            free -= slowest.degree
            slowest.degree *= 2
            slowest.load = wider


def even_parts(ordered: Sequence[int], count: int) -> list[Sequence[int]]:
    """`count` consecutive parts whose largest sum is smallest (bisection gives what FlexSP's DP gives)."""
    low, high = max(max(ordered), math.ceil(sum(ordered) / count)), sum(ordered)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(ordered, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _cut(ordered, low)


def _cut(ordered: Sequence[int], most: int) -> list[Sequence[int]]:
    parts: list[Sequence[int]] = []
    begin, total = 0, 0
    for i, length in enumerate(ordered):
        if total + length > most and i > begin:
            parts.append(ordered[begin:i])
            begin, total = i, 0
        total += length
    return [*parts, ordered[begin:]]
