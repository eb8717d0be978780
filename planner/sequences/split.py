"""First half of the greedy: passes of several ranks, longest sequence first.

For the longest sequence left, every degree and set of ranks that meets the target is filled with further sequences; the
pass that wastes least wins: rank time it takes (waiting included) over what its sequences are worth
(StepProblem.value).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from heteromesh.planner.cost.ranksets import Line, RankSetCost
from heteromesh.planner.sequences.partial import SplitPass, StepProblem, empty_step

NARROW = 6
"""Hosts that are looked at for one sequence: those whose ranks are free first."""
FULL = 0.01
"""A pass with this share of its memory left takes no further sequence."""
JOINED = 16
"""Sequences of one pass, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyChoice:
    """What one run of the greedy tries differently."""

    degrees: int = 10
    """Degrees compared per set of ranks, smallest possible first."""
    least: int = 2
    """Smallest degree of a split pass."""
    price: float = 1.0
    """Weight of full memory against short passes."""
    idle: float = 1.0
    """Weight of waiting; less than 1 trusts that local passes fill it."""
    full: bool = False
    """Passes may hold more than shards proportional to speed allow, where memory is not proportional to speed."""
    late: bool = False
    """Takes the last free one of equally good sets of ranks."""
    local_share: float = 0.0
    """A sequence is split unless ranks with this share of the cluster's speed can take it alone; above 1: always."""


@dataclass(frozen=True, slots=True)
class _Option:
    score: float
    ranks: tuple[int, ...]
    rank_set: RankSetCost
    indices: tuple[int, ...]
    end: float


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Ranks that could run a pass, and when."""

    ranks: tuple[int, ...]
    rank_set: RankSetCost
    start: float
    idle: float
    """Rank time lost to waiting, at speed 1."""


class _Filling:
    """A pass while sequences are added to it."""

    def __init__(self, rank_set: RankSetCost, length: int, seconds: float) -> None:
        """`length`: of its first sequence; `seconds`: that it may take."""
        self._rank_set, self._limit = rank_set, seconds
        self.tokens, self.squares = length, length**2
        self._left = [seconds - line.at(length, length**2) for line in rank_set.lines]
        """The time that each line of the seconds leaves."""
        if length > rank_set.even:
            self._left = [seconds - rank_set.seconds(length, length**2)] * len(rank_set.lines)

    def has_time(self) -> bool:
        """Returns whether any sequence may fit."""
        return min(self._left) > 0

    def reach(self) -> float:
        """Returns the length of the longest sequence that fits in time."""
        return min(map(_reach, self._rank_set.lines, self._left))

    def add(self, length: int) -> bool:
        """Adds a sequence; False where it takes too long after all."""
        tokens, squares = self.tokens + length, self.squares + length * length
        if tokens > self._rank_set.even:
            left = self._limit - self._rank_set.seconds(tokens, squares)
            if left < 0:
                return False
            self._left = [left] * len(self._left)
        else:
            self._left = [
                left - (line.per_token * length + line.per_square * length * length)
                for line, left in zip(self._rank_set.lines, self._left, strict=True)
            ]
        self.tokens, self.squares = tokens, squares
        return True


class Splitter:
    """Adds split passes to a partial step, one at a time."""

    def __init__(self, problem: StepProblem, target: float, choice: GreedyChoice) -> None:
        self.problem, self.target, self.choice = problem, target, choice
        self.partial = empty_step(problem.costs.ranks)
        self.left = _Left(len(problem.lengths))
        self.local = _first_local(problem, target, choice.local_share)
        """The first sorted index from which on a sequence may stay on one rank."""

    def must(self) -> None:
        """Passes for all sequences that fit no rank in time."""
        head = self.left.next(0)
        while head < self.local:
            self.one(head)
            head = self.left.next(head + 1)

    def more(self) -> bool:
        """Adds a pass for the longest sequence left, though it fits a rank; False if there is none."""
        head = self.left.next(0)
        return head < len(self.problem.lengths) and self.one(head)

    def one(self, head: int) -> bool:
        """Adds a pass for this sequence; False if no set of several ranks can take it."""
        load = [slot.free for slot in self.partial.ends]
        option = self._best(load, head) or _anywhere(self.problem, load, head)
        if option is None:
            return False
        for index in option.indices:
            self.left.take(index)
        p = SplitPass(tuple(sorted(option.ranks)), option.rank_set, option.indices)
        self.partial.add_split(p, max(load[r] for r in option.ranks), option.end)
        return True

    def _best(self, load: list[float], head: int) -> _Option | None:
        """Returns the least wasteful pass that has sequence `head` and ends by the target."""
        options = (
            self._filled(candidate, head)
            for pool in _pools(self.problem, load)
            for candidate in self._fitting(pool, load, head)
        )
        return min(options, key=lambda option: option.score, default=None)

    def _fitting(self, pool: list[int], load: list[float], head: int) -> Iterator[_Candidate]:
        """Yields, of each degree, the ranks of a pool that wait least and end with the sequence in time."""
        problem, choice, length = self.problem, self.choice, self.problem.lengths[head]
        speeds = problem.costs.speeds
        ranks = sorted(pool, key=load.__getitem__)
        free = [load[r] for r in ranks]
        power = list(accumulate((speeds[r] for r in ranks), initial=0.0))
        busy = list(accumulate((speeds[r] * load[r] for r in ranks), initial=0.0))
        tried = 0
        for degree in range(max(choice.least, problem.fewest(head)), len(ranks) + 1):
            rank_set = problem.rank_sets.find(ranks[:degree], length)
            if rank_set is None or (problem.rank_sets.uniform and rank_set.most < length):
                continue
            at = _window(free, power, busy, degree, self.target - _alone(rank_set, length), choice.late)
            if at is None:
                continue
            members = ranks[at : at + degree]
            rank_set = problem.rank_sets.find(members, length)
            start = free[at + degree - 1]
            if rank_set is None or rank_set.most < length or start + _alone(rank_set, length) > self.target:
                continue
            idle = choice.idle * (start * rank_set.power - (busy[at + degree] - busy[at]))
            yield _Candidate(tuple(members), rank_set, start, idle)
            tried += 1
            if tried == choice.degrees:
                return

    def _filled(self, candidate: _Candidate, head: int) -> _Option:
        """Returns the pass with `head` and, longest first, whatever else fits its memory and the target."""
        problem, rank_set, lengths = self.problem, candidate.rank_set, self.problem.lengths
        filling = _Filling(rank_set, lengths[head], self.target - candidate.start)
        capacity = self._capacity(rank_set, lengths[head])
        # A short sequence pays the exchange; worth it only if that is less than its share of a local pass's fixed cost.
        joins = rank_set.exposed <= problem.token_price * rank_set.power / len(candidate.ranks)
        shortest = 0 if joins else max(problem.costs.capacity)
        indices, value, index = [head], problem.value(head, self.choice.price), head
        while capacity - filling.tokens > FULL * capacity and filling.has_time() and len(indices) < JOINED:
            reach = min(capacity - filling.tokens, filling.reach())
            index = self.left.next(max(index + 1, bisect_left(problem.negative, -reach)))
            if index >= len(lengths) or lengths[index] <= shortest:
                break
            if filling.add(lengths[index]):
                indices.append(index)
                value += problem.value(index, self.choice.price)
        seconds = rank_set.seconds(filling.tokens, filling.squares)
        score = (rank_set.power * seconds + candidate.idle) / value
        return _Option(score, candidate.ranks, rank_set, tuple(indices), candidate.start + seconds)

    def _capacity(self, rank_set: RankSetCost, length: int) -> int:
        """Returns the tokens that a pass with a sequence of this length may hold."""
        if rank_set.resident < rank_set.even:
            # memory of the host is for sequences that are too long, not for more of them
            return max(length, rank_set.resident)
        return rank_set.most if self.choice.full else rank_set.even


class _Left:
    """Indices not yet in a pass; `next` skips taken ones (disjoint sets, path halving)."""

    def __init__(self, count: int) -> None:
        self._next = list(range(count + 1))

    def next(self, index: int) -> int:
        """Returns the first index from here on that is left; the number of indices if none is."""
        link = self._next
        while link[index] != index:
            link[index] = link[link[index]]
            index = link[index]
        return index

    def take(self, index: int) -> None:
        self._next[index] = index + 1

    def __iter__(self) -> Iterator[int]:
        index = self.next(0)
        while index < len(self._next) - 1:
            yield index
            index = self.next(index + 1)


def _first_local(problem: StepProblem, target: float, share: float) -> int:
    """Returns the first sorted index from which on sequences fit a rank in time, for enough of the cluster's speed."""
    costs, fixed = problem.costs, problem.costs.seconds_per_pass
    for index, length in enumerate(problem.lengths):
        able = [
            v
            for v, capacity, alone in zip(costs.speeds, costs.capacity, problem.alone_each(index), strict=True)
            if capacity >= length and fixed + alone <= target
        ]
        if able and sum(able) >= share * problem.power:
            return index
    return len(problem.lengths)


def _pools(problem: StepProblem, load: list[float]) -> list[list[int]]:
    near = problem.rank_sets.near
    if len(near) > NARROW:
        near = sorted(near, key=lambda p: sum(load[r] for r in p) / len(p))[:NARROW]
    return near + problem.rank_sets.alike + problem.rank_sets.wide


def _alone(rank_set: RankSetCost, length: int) -> float:
    return rank_set.seconds(length, length * length) if length <= rank_set.most else 0.0


def _window(
    free: list[float], power: list[float], busy: list[float], degree: int, latest: float, late: bool
) -> int | None:
    """Returns where those `degree` neighbours by free time begin that wait least and can start by `latest`."""
    last = bisect_right(free, latest + 1e-12, degree - 1) - degree
    best, least = None, math.inf
    for i in range(last, -1, -1) if late else range(last + 1):
        idle = free[i + degree - 1] * (power[i + degree] - power[i]) - (busy[i + degree] - busy[i])
        if idle < least - 1e-9:
            best, least = i, idle
            if idle <= 1e-9:
                break
    return best


def _reach(line: Line, seconds: float) -> float:
    """Returns the longest sequence by which the line grows at most that much."""
    per_token, per_square = line.per_token, line.per_square
    if per_square > 0:
        # The stable root of per_square * n^2 + per_token * n = seconds.
        return 2 * seconds / (per_token + math.sqrt(per_token * per_token + 4 * per_square * seconds))
    return seconds / per_token if per_token > 0 else math.inf


def _anywhere(problem: StepProblem, load: list[float], head: int) -> _Option | None:
    """Returns the pass with `head` alone that ends first, whatever the target; None if no set of several ranks can take
    it.
    """
    best: _Option | None = None
    length, capacity = problem.lengths[head], problem.costs.capacity
    for order in (
        sorted(range(len(load)), key=lambda r: (load[r], r)),
        sorted(range(len(load)), key=lambda r: -capacity[r]),
    ):
        for degree in range(problem.fewest(head), len(load) + 1):
            ranks = order[:degree]
            rank_set = problem.rank_sets.find(ranks, length)
            if rank_set is None or rank_set.most < length:
                continue
            end = max(load[r] for r in ranks) + rank_set.seconds(length, length * length)
            if best is None or end < best.end:
                best = _Option(0.0, tuple(ranks), rank_set, (head,), end)
    return best
