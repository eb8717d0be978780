"""A step while it is being planned: sequences by descending length, passes that are not yet exact."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from heteromesh.planner.cost.envelope import Envelope, envelope
from heteromesh.planner.cost.passes import LOCAL, Costs
from heteromesh.planner.cost.ranksets import RankSetCache, RankSetCost
from heteromesh.planner.cost.shards import fastest_pass, make_pass
from heteromesh.planner.plan import Pass

END = -1
"""Position of the local passes after all split ones."""


class StepProblem:
    """A batch to plan. Sequences are named by their index in descending order of length ("indices")."""

    def __init__(self, batch: Sequence[int], costs: Costs) -> None:
        self.batch = tuple(batch)
        self.costs = costs
        self.rank_sets = RankSetCache(costs)
        self.order = sorted(range(len(batch)), key=lambda k: (-batch[k], k))
        """Sorted index to index in the batch."""
        self.lengths = [batch[k] for k in self.order]
        self.negative = [-n for n in self.lengths]
        """Ascending, for bisection."""
        a, b = costs.seconds_per_token2, costs.seconds_per_token
        self.work = [a * n * n + b * n for n in self.lengths]
        """Seconds on one rank of speed 1."""
        self.capacity = costs.resident or costs.capacity
        """Per rank, tokens of several sequences that one pass holds."""
        self.ample = min(costs.resident, default=math.inf)
        """Tokens that every rank holds without moving any to host memory."""
        self.best: Envelope = envelope(costs)
        self.token_price = costs.seconds_per_pass * sum(costs.speeds) / sum(costs.capacity)
        """What a token's share of a pass's fixed cost is worth, in seconds of a rank of speed 1, in full passes."""
        self.least = self._least()
        """Seconds at speed 1 that a sequence takes at its cheapest degree, fixed cost left out."""
        self.power = sum(costs.speeds)
        self._capacity_sums = list(accumulate(sorted(costs.capacity, reverse=True)))

    def _least(self) -> list[float]:
        lengths = np.array(self.lengths, float)
        own = self.best.own_seconds(self.costs, lengths) - self.best.fixed
        least: list[float] = (own * self.best.power).min(axis=1).tolist()
        return least

    def alone(self, index: int, rank: int) -> float:
        """Returns seconds of the sequence on one rank, without the fixed cost of a pass."""
        length, seconds = self.lengths[index], self.work[index] / self.costs.speeds[rank]
        if length <= self.capacity[rank]:
            return seconds
        ratio = self.costs.offload_ratio((rank,), None, (length,))
        return seconds + self.costs.offload_wait(rank, length, seconds, ratio)

    def alone_each(self, index: int) -> list[float]:
        """`alone` on every rank."""
        if self.lengths[index] <= self.ample:
            work = self.work[index]
            return [work / v for v in self.costs.speeds]
        return [self.alone(index, r) for r in range(self.costs.ranks)]

    def fewest(self, index: int) -> int:
        """Returns the smallest degree, at least 2, at which some set of ranks has room for the sequence."""
        return max(2, 1 + bisect_left(self._capacity_sums, self.lengths[index]))

    def value(self, index: int, price: float) -> float:
        """Returns what it is worth to have a sequence done: its cheapest seconds and its tokens' price."""
        return self.least[index] + price * self.token_price * self.lengths[index]


@dataclass(frozen=True, slots=True)
class SplitPass:
    """A pass of several ranks."""

    ranks: tuple[int, ...]
    rank_set: RankSetCost
    indices: tuple[int, ...]


@dataclass(slots=True)
class TimeSlot:
    """Time of one rank that local passes can have: before a split pass that it would wait for, or at the end."""

    rank: int
    before: int
    """Position of that split pass; END for the end."""
    free: float
    """Where its local passes end so far."""
    until: float
    """Start of that split pass; infinite at the end."""


@dataclass(slots=True)
class LocalPass:
    """A pass of one rank; sequences are added as long as they fit."""

    slot: TimeSlot
    left: int
    """Tokens that still fit."""
    indices: list[int]


@dataclass(slots=True)
class PartialStep:
    """A step: every rank runs its split passes in list order, local ones in their slots."""

    split: list[SplitPass] = field(default_factory=list)
    local: list[LocalPass] = field(default_factory=list)
    gaps: list[TimeSlot] = field(default_factory=list)
    ends: list[TimeSlot] = field(default_factory=list)
    """Per rank: its slot after the last split pass."""

    @property
    def seconds(self) -> float:
        return max(slot.free for slot in self.ends)

    def copy(self) -> PartialStep:
        """Returns a partial step with slots of its own; without local passes."""
        assert not self.local
        return PartialStep(list(self.split), [], [replace(s) for s in self.gaps], [replace(s) for s in self.ends])

    def add_split(self, p: SplitPass, start: float, end: float) -> None:
        """Appends a split pass; a rank that waits for it gets a gap."""
        for r in p.ranks:
            slot = self.ends[r]
            if slot.free < start:
                self.gaps.append(TimeSlot(r, len(self.split), slot.free, start))
            slot.free = end
        self.split.append(p)

    def passes(self, problem: StepProblem) -> list[Pass]:
        """Returns the exact passes, in an order that every rank can follow."""
        local: dict[int, list[LocalPass]] = {}
        for p in self.local:
            local.setdefault(p.slot.before, []).append(p)
        made = []
        for position, s in enumerate(self.split):
            made += [_exact((p.slot.rank,), LOCAL, p.indices, problem) for p in local.get(position, [])]
            made.append(_exact(s.ranks, s.rank_set.method_name, s.indices, problem))
        return made + [_exact((p.slot.rank,), LOCAL, p.indices, problem) for p in local.get(END, [])]


def empty_step(ranks: int) -> PartialStep:
    """No passes yet."""
    return PartialStep(ends=[TimeSlot(r, END, 0.0, math.inf) for r in range(ranks)])


def _exact(ranks: Sequence[int], method: str, indices: Sequence[int], problem: StepProblem) -> Pass:
    made = make_pass(ranks, method, [problem.order[i] for i in indices], problem.batch, problem.costs)
    return fastest_pass(made, problem.batch, problem.costs)
