"""First half of the greedy: passes of several ranks, longest sequence first.

For the longest sequence left, every degree and set of ranks that meets the target is filled with further sequences; the
pass that wastes least wins: rank time it takes (waiting included) over what its sequences are worth (Task.value).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from heteromesh.planner.cost.ranksets import Line, Team
from heteromesh.planner.sequences.draft import SplitPass, Task, empty_draft

NARROW = 6
"""Hosts that are looked at for one sequence: those whose ranks are free first."""
FULL = 0.01
"""A pass with this share of its memory left takes no further sequence."""
JOINED = 16
"""Sequences of one pass, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
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
    """Of equally good sets of ranks the one that is free last."""
    local_share: float = 0.0
    """A sequence is split unless ranks with this share of the cluster's speed can take it alone; above 1: always."""


@dataclass(frozen=True, slots=True)
class _Option:
    score: float
    ranks: tuple[int, ...]
    team: Team
    places: tuple[int, ...]
    end: float


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Ranks that could run a pass, and when."""

    ranks: tuple[int, ...]
    team: Team
    start: float
    idle: float
    """Rank time lost to waiting, at speed 1."""


class _Filling:
    """A pass while sequences are added to it."""

    def __init__(self, team: Team, length: int, seconds: float) -> None:
        """`length`: of its first sequence; `seconds`: that it may take."""
        self._team, self._limit = team, seconds
        self.tokens, self.squares = length, length**2
        self._left = [seconds - line.at(length, length**2) for line in team.lines]
        """By line of the team's seconds, the time that it leaves."""
        if length > team.even:
            self._left = [seconds - team.seconds(length, length**2)] * len(team.lines)

    def has_time(self) -> bool:
        """Whether any sequence may fit."""
        return min(self._left) > 0

    def reach(self) -> float:
        """Returns the length of the longest sequence that fits in time."""
        return min(map(_reach, self._team.lines, self._left))

    def add(self, length: int) -> bool:
        """Adds a sequence; False where it takes too long after all."""
        tokens, squares = self.tokens + length, self.squares + length * length
        if tokens > self._team.even:
            left = self._limit - self._team.seconds(tokens, squares)
            if left < 0:
                return False
            self._left = [left] * len(self._left)
        else:
            self._left = [
                left - (line.per_token * length + line.per_square * length * length)
                for line, left in zip(self._team.lines, self._left, strict=True)
            ]
        self.tokens, self.squares = tokens, squares
        return True


class Splitter:
    """Adds split passes to a draft, one at a time."""

    def __init__(self, task: Task, target: float, choice: Choice) -> None:
        self.task, self.target, self.choice = task, target, choice
        self.draft = empty_draft(task.costs.ranks)
        self.left = _Left(len(task.lengths))
        self.local = _first_local(task, target, choice.local_share)
        """The first place from which on a sequence may stay on one rank."""

    def must(self) -> None:
        """Passes for all sequences that fit no rank in time."""
        head = self.left.next(0)
        while head < self.local:
            self.one(head)
            head = self.left.next(head + 1)

    def more(self) -> bool:
        """A pass for the longest sequence left, though it fits a rank; False if there is none."""
        head = self.left.next(0)
        return head < len(self.task.lengths) and self.one(head)

    def one(self, head: int) -> bool:
        """A pass for this sequence; False if no set of several ranks can take it."""
        load = [slot.free for slot in self.draft.ends]
        option = self._best(load, head) or _anywhere(self.task, load, head)
        if option is None:
            return False
        for place in option.places:
            self.left.take(place)
        p = SplitPass(tuple(sorted(option.ranks)), option.team, option.places)
        self.draft.add_split(p, max(load[r] for r in option.ranks), option.end)
        return True

    def _best(self, load: list[float], head: int) -> _Option | None:
        """Returns the least wasteful pass that has sequence `head` and ends by the target."""
        options = (
            self._filled(candidate, head)
            for pool in _pools(self.task, load)
            for candidate in self._fitting(pool, load, head)
        )
        return min(options, key=lambda option: option.score, default=None)

    def _fitting(self, pool: list[int], load: list[float], head: int) -> Iterator[_Candidate]:
        """Yields, of each degree, the ranks of a pool that wait least and end with the sequence in time."""
        task, choice, length = self.task, self.choice, self.task.lengths[head]
        speeds = task.costs.speeds
        ranks = sorted(pool, key=load.__getitem__)
        free = [load[r] for r in ranks]
        power = list(accumulate((speeds[r] for r in ranks), initial=0.0))
        busy = list(accumulate((speeds[r] * load[r] for r in ranks), initial=0.0))
        tried = 0
        for degree in range(max(choice.least, task.fewest(head)), len(ranks) + 1):
            team = task.fleet.team(ranks[:degree], length)
            if team is None or (task.fleet.uniform and team.most < length):
                continue
            at = _window(free, power, busy, degree, self.target - _alone(team, length), choice.late)
            if at is None:
                continue
            members = ranks[at : at + degree]
            team = task.fleet.team(members, length)
            start = free[at + degree - 1]
            if team is None or team.most < length or start + _alone(team, length) > self.target:
                continue
            idle = choice.idle * (start * team.power - (busy[at + degree] - busy[at]))
            yield _Candidate(tuple(members), team, start, idle)
            tried += 1
            if tried == choice.degrees:
                return

    def _filled(self, candidate: _Candidate, head: int) -> _Option:
        """Returns the pass with `head` and, longest first, whatever else fits its memory and the target."""
        task, team, lengths = self.task, candidate.team, self.task.lengths
        filling = _Filling(team, lengths[head], self.target - candidate.start)
        room = self._room(team, lengths[head])
        # A short sequence pays the exchange; worth it only if that is less than its share of a local pass's fixed cost.
        joins = team.wire <= task.token_price * team.power / len(candidate.ranks)
        shortest = 0 if joins else max(task.costs.capacity)
        places, value, place = [head], task.value(head, self.choice.price), head
        while room - filling.tokens > FULL * room and filling.has_time() and len(places) < JOINED:
            reach = min(room - filling.tokens, filling.reach())
            place = self.left.next(max(place + 1, bisect_left(task.negative, -reach)))
            if place >= len(lengths) or lengths[place] <= shortest:
                break
            if filling.add(lengths[place]):
                places.append(place)
                value += task.value(place, self.choice.price)
        seconds = team.seconds(filling.tokens, filling.squares)
        score = (team.power * seconds + candidate.idle) / value
        return _Option(score, candidate.ranks, team, tuple(places), candidate.start + seconds)

    def _room(self, team: Team, length: int) -> int:
        """Returns the tokens that a pass with a sequence of this length may hold."""
        if team.resident < team.even:
            # memory of the host is for sequences that are too long, not for more of them
            return max(length, team.resident)
        return team.most if self.choice.full else team.even


class _Left:
    """Places not yet in a pass; `next` skips taken ones (disjoint sets, path halving)."""

    def __init__(self, count: int) -> None:
        self._next = list(range(count + 1))

    def next(self, place: int) -> int:
        """The first place from here on that is left; the number of places if there is none."""
        link = self._next
        while link[place] != place:
            link[place] = link[link[place]]
            place = link[place]
        return place

    def take(self, place: int) -> None:
        self._next[place] = place + 1

    def __iter__(self) -> Iterator[int]:
        place = self.next(0)
        while place < len(self._next) - 1:
            yield place
            place = self.next(place + 1)


def _first_local(task: Task, target: float, share: float) -> int:
    """The first place from which on sequences fit one rank in time, for enough of the cluster's speed."""
    costs, fixed = task.costs, task.costs.seconds_per_pass
    for place, length in enumerate(task.lengths):
        able = [
            v
            for v, room, alone in zip(costs.speeds, costs.capacity, task.alone_each(place), strict=True)
            if room >= length and fixed + alone <= target
        ]
        if able and sum(able) >= share * task.power:
            return place
    return len(task.lengths)


def _pools(task: Task, load: list[float]) -> list[list[int]]:
    near = task.fleet.near
    if len(near) > NARROW:
        near = sorted(near, key=lambda p: sum(load[r] for r in p) / len(p))[:NARROW]
    return near + task.fleet.alike + task.fleet.wide


def _alone(team: Team, length: int) -> float:
    return team.seconds(length, length * length) if length <= team.most else 0.0


def _window(
    free: list[float], power: list[float], busy: list[float], degree: int, latest: float, late: bool
) -> int | None:
    """Of `degree` neighbours among ranks by free time, those that wait least and can start by `latest`."""
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
    """The longest sequence by which the line grows at most that much."""
    per_token, per_square = line.per_token, line.per_square
    if per_square > 0:
        # The stable root of per_square * n^2 + per_token * n = seconds.
        return 2 * seconds / (per_token + math.sqrt(per_token * per_token + 4 * per_square * seconds))
    return seconds / per_token if per_token > 0 else math.inf


def _anywhere(task: Task, load: list[float], head: int) -> _Option | None:
    """The pass with `head` alone that ends first, whatever the target; None if no set of several ranks can take it."""
    best: _Option | None = None
    length, capacity = task.lengths[head], task.costs.capacity
    for order in (
        sorted(range(len(load)), key=lambda r: (load[r], r)),
        sorted(range(len(load)), key=lambda r: -capacity[r]),
    ):
        for degree in range(task.fewest(head), len(load) + 1):
            ranks = order[:degree]
            team = task.fleet.team(ranks, length)
            if team is None or team.most < length:
                continue
            end = max(load[r] for r in ranks) + team.seconds(length, length * length)
            if best is None or end < best.end:
                best = _Option(0.0, tuple(ranks), team, (head,), end)
    return best
