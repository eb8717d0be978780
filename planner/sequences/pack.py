"""Second half of the greedy: the sequences that need one rank, packed into local passes around the split ones.

Two-dimensional best-fit decreasing: a pass has room for its rank's tokens, a slot has time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from heteromesh.planner.sequences.draft import Draft, LocalPass, Slot, Task

EPSILON = 1e-12


def pack_phase(task: Task, draft: Draft, places: Iterable[int], target: float) -> list[int]:
    """Adds local passes with these places (descending length) to the draft; returns those that fit no slot in time."""
    packer = _Packer(task, draft, target)
    return [place for place in places if not packer.put(place)]


def pack_anyway(task: Task, draft: Draft, places: Sequence[int]) -> None:
    """Adds these places where their rank ends first, whatever the target; each must fit some rank."""
    costs = task.costs
    for place in places:
        length, work = task.lengths[place], task.work[place]
        fresh = [
            (slot.free + costs.seconds_per_pass + alone, slot.rank)
            for slot, room, alone in zip(draft.ends, costs.capacity, task.alone_each(place), strict=True)
            if room >= length
        ]
        joined = [
            (p.slot.free + work / costs.speeds[p.slot.rank], i)
            for i, p in enumerate(draft.local)
            if p.left >= length and p.slot is draft.ends[p.slot.rank]
        ]
        if joined and min(joined) <= min(fresh):
            end, i = min(joined)
            p = draft.local[i]
        else:
            end, rank = min(fresh)
            p = LocalPass(draft.ends[rank], max(length, task.room[rank]), [])
            draft.local.append(p)
        p.left -= length
        p.places.append(place)
        p.slot.free = end


class _Packer:
    def __init__(self, task: Task, draft: Draft, target: float) -> None:
        self.task, self.draft = task, draft
        self.open: list[tuple[int, int]] = []
        """(tokens left, index into draft.local) of passes that still take sequences, ascending."""
        shortest = task.costs.seconds_per_pass + task.work[-1] / max(task.costs.speeds)
        self.slots = [(s, min(s.until, target) + EPSILON) for s in [*draft.gaps, *draft.ends]]
        """Slots and when they end."""
        self.slots = [(s, end) for s, end in self.slots if s.free + shortest <= end]
        self.ends = {id(s): end for s, end in self.slots}

    def put(self, place: int) -> bool:
        """Into the fullest pass whose slot has the time, else into a new pass in the slot with most time."""
        length, work, speeds = self.task.lengths[place], self.task.work[place], self.task.costs.speeds
        for at in range(bisect_left(self.open, (length, -1)), len(self.open)):
            p = self.draft.local[self.open[at][1]]
            if p.slot.free + work / speeds[p.slot.rank] <= self.ends[id(p.slot)]:
                _, i = self.open.pop(at)
                self._add(i, place)
                return True
        slot = self._freest(place)
        if slot is None:
            return False
        self.draft.local.append(LocalPass(slot, max(length, self.task.room[slot.rank]), []))
        slot.free += self.task.costs.seconds_per_pass + self.task.alone(place, slot.rank) - work / speeds[slot.rank]
        self._add(len(self.draft.local) - 1, place)
        return True

    def _freest(self, place: int) -> Slot | None:
        """The slot with most time left after a new pass with this sequence; None if it fits none."""
        costs, length = self.task.costs, self.task.lengths[place]
        each = self.task.alone_each(place)
        best, most = None, costs.seconds_per_pass
        for slot, end in self.slots:
            rest = end - slot.free - each[slot.rank]
            if rest >= most and costs.capacity[slot.rank] >= length:
                best, most = slot, rest
        return best

    def _add(self, i: int, place: int) -> None:
        p = self.draft.local[i]
        p.left -= self.task.lengths[place]
        p.places.append(place)
        p.slot.free += self.task.work[place] / self.task.costs.speeds[p.slot.rank]
        if p.left:
            insort(self.open, (p.left, i))
