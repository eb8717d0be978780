"""Second half of the greedy: the sequences that need one rank, packed into local passes around the split ones.

Two-dimensional best-fit decreasing: a pass has room for its rank's tokens, a slot has time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from heteromesh.planner.sequences.partial import LocalPass, PartialStep, StepProblem, TimeSlot

EPSILON = 1e-12


def pack_phase(problem: StepProblem, partial: PartialStep, indices: Iterable[int], target: float) -> list[int]:
    """Adds local passes with these indices (descending length) to the step; returns those that fit no slot in time."""
    packer = _Packer(problem, partial, target)
    return [index for index in indices if not packer.put(index)]


def pack_anyway(problem: StepProblem, partial: PartialStep, indices: Sequence[int]) -> None:
    """Adds these indices where their rank ends first, whatever the target; each must fit some rank."""
    costs = problem.costs
    for index in indices:
        length, work = problem.lengths[index], problem.work[index]
        fresh = [
            (slot.free + costs.seconds_per_pass + alone, slot.rank)
            for slot, capacity, alone in zip(partial.ends, costs.capacity, problem.alone_each(index), strict=True)
            if capacity >= length
        ]
        joined = [
            (p.slot.free + work / costs.speeds[p.slot.rank], i)
            for i, p in enumerate(partial.local)
            if p.left >= length and p.slot is partial.ends[p.slot.rank]
        ]
        if joined and min(joined) <= min(fresh):
            end, i = min(joined)
            p = partial.local[i]
        else:
            end, rank = min(fresh)
            p = LocalPass(partial.ends[rank], max(length, problem.capacity[rank]), [])
            partial.local.append(p)
        p.left -= length
        p.indices.append(index)
        p.slot.free = end


class _Packer:
    def __init__(self, problem: StepProblem, partial: PartialStep, target: float) -> None:
        self.problem, self.partial = problem, partial
        self.open: list[tuple[int, int]] = []
        """(tokens left, index into partial.local) of passes that still take sequences, ascending."""
        shortest = problem.costs.seconds_per_pass + problem.work[-1] / max(problem.costs.speeds)
        self.slots = [(s, min(s.until, target) + EPSILON) for s in [*partial.gaps, *partial.ends]]
        """Slots and when they end."""
        self.slots = [(s, end) for s, end in self.slots if s.free + shortest <= end]
        self.ends = {id(s): end for s, end in self.slots}

    def put(self, index: int) -> bool:
        """Into the fullest pass whose slot has the time, else into a new pass in the slot with most time."""
        length, work, speeds = self.problem.lengths[index], self.problem.work[index], self.problem.costs.speeds
        for at in range(bisect_left(self.open, (length, -1)), len(self.open)):
            p = self.partial.local[self.open[at][1]]
            if p.slot.free + work / speeds[p.slot.rank] <= self.ends[id(p.slot)]:
                _, i = self.open.pop(at)
                self._add(i, index)
                return True
        slot = self._freest(index)
        if slot is None:
            return False
        self.partial.local.append(LocalPass(slot, max(length, self.problem.capacity[slot.rank]), []))
        slot.free += (
            self.problem.costs.seconds_per_pass + self.problem.alone(index, slot.rank) - work / speeds[slot.rank]
        )
        self._add(len(self.partial.local) - 1, index)
        return True

    def _freest(self, index: int) -> TimeSlot | None:
        """Returns the slot with most time left after a new pass with this sequence; None if it fits none."""
        costs, length = self.problem.costs, self.problem.lengths[index]
        each = self.problem.alone_each(index)
        best, most = None, costs.seconds_per_pass
        for slot, end in self.slots:
            rest = end - slot.free - each[slot.rank]
            if rest >= most and costs.capacity[slot.rank] >= length:
                best, most = slot, rest
        return best

    def _add(self, i: int, index: int) -> None:
        p = self.partial.local[i]
        p.left -= self.problem.lengths[index]
        p.indices.append(index)
        p.slot.free += self.problem.work[index] / self.problem.costs.speeds[p.slot.rank]
        if p.left:
            insort(self.open, (p.left, i))
