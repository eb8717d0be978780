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
        option = _best(self.task, load, head, self.target, self.choice, self.left)
        option = option or _anywhere(self.task, load, head)
        if option is None:
            return False
        for place in option.places:
            self.left.take(place)
        p = SplitPass(tuple(sorted(option.ranks)), option.team, option.places)
        self.draft.add_split(p, max(load[r] for r in option.ranks), option.end)
        return True


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


def _best(task: Task, load: list[float], head: int, target: float, choice: Choice, left: _Left) -> _Option | None:
    """The least wasteful pass that has sequence `head` and ends by `target`."""
    best: _Option | None = None
    speeds, fewest = task.costs.speeds, task.fewest(head)
    for pool in _pools(task, load):
        ranks = sorted(pool, key=load.__getitem__)
        free = [load[r] for r in ranks]
        power = list(accumulate((speeds[r] for r in ranks), initial=0.0))
        busy = list(accumulate((speeds[r] * load[r] for r in ranks), initial=0.0))
        tried = 0
        for degree in range(max(choice.least, fewest), len(ranks) + 1):
            team = task.fleet.team(ranks[:degree], task.lengths[head])
            if team is None or (task.fleet.uniform and team.most < task.lengths[head]):
                continue
            at = _window(free, power, busy, degree, target - _alone(task, team, head), choice.late)
            if at is None:
                continue
            members = ranks[at : at + degree]
            team = task.fleet.team(members, task.lengths[head])
            start = free[at + degree - 1]
            if team is None or team.most < task.lengths[head] or start + _alone(task, team, head) > target:
                continue
            idle = choice.idle * (start * team.power - (busy[at + degree] - busy[at]))
            option = _filled(task, team, tuple(members), head, start, target, idle, choice, left)
            if best is None or option.score < best.score:
                best = option
            tried += 1
            if tried == choice.degrees:
                break
    return best


def _pools(task: Task, load: list[float]) -> list[list[int]]:
    near = task.fleet.near
    if len(near) > NARROW:
        near = sorted(near, key=lambda p: sum(load[r] for r in p) / len(p))[:NARROW]
    return near + task.fleet.alike + task.fleet.wide


def _alone(task: Task, team: Team, head: int) -> float:
    n = task.lengths[head]
    return team.seconds(n, n * n) if n <= team.most else 0.0


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


def _filled(
    task: Task,
    team: Team,
    ranks: tuple[int, ...],
    head: int,
    start: float,
    target: float,
    idle: float,
    choice: Choice,
    left: _Left,
) -> _Option:
    """The pass with `head` and, longest first, whatever else fits its memory and the target."""
    lengths = task.lengths
    places = [head]
    tokens, squares = lengths[head], lengths[head] ** 2
    seconds = team.seconds(tokens, squares)
    value = task.value(head, choice.price)
    # A short sequence pays the exchange; worth it only if that is less than its share of a local pass's fixed cost.
    joins = team.wire <= task.token_price * team.power / len(ranks)
    rank_room = max(task.costs.capacity)
    room = team.most if choice.full else team.even
    if team.resident < team.even:
        room = max(tokens, team.resident)  # memory of the host is for sequences that are too long, not for more of them
    spare, late = room - tokens, target - start
    # what each line of the team's seconds leaves of the time
    times = [late - line.at(tokens, squares) for line in team.lines]
    if tokens > team.even:
        times = [late - seconds] * len(times)
    place, full = head, FULL * room
    while spare > full and min(times) > 0 and len(places) < JOINED:
        reach = min(map(_reach, team.lines, times))
        place = left.next(max(place + 1, bisect_left(task.negative, -min(spare, reach))))
        if place >= len(lengths) or (lengths[place] <= rank_room and not joins):
            break
        n = lengths[place]
        if tokens + n > team.even:
            later = late - team.seconds(tokens + n, squares + n * n)
            if later < 0:
                continue
            times = [later] * len(times)
        else:
            times = [
                time - (line.per_token * n + line.per_square * n * n)
                for line, time in zip(team.lines, times, strict=True)
            ]
        places.append(place)
        tokens, squares, spare = tokens + n, squares + n * n, spare - n
        value += task.value(place, choice.price)
    seconds = team.seconds(tokens, squares)
    return _Option((team.power * seconds + idle) / value, ranks, team, tuple(places), start + seconds)


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
