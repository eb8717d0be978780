"""Second half of the greedy: the sequences that need one rank, packed into local passes after the split ones.

Two-dimensional best-fit decreasing: a pass has room for its rank's tokens, a rank has time until the target.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from heteromesh.planner.draft import Draft, LocalPass, Task


def pack_phase(task: Task, draft: Draft, places: Sequence[int], target: float) -> list[int]:
    """Adds local passes with these places to the draft; returns the places that fit no rank by the target."""
    packer = _Packer(task, draft, target)
    return [place for place in places if not packer.put(place)]


def pack_anyway(task: Task, draft: Draft, places: Sequence[int]) -> None:
    """Adds these places where their rank ends first, whatever the target; each must fit some rank."""
    for place in places:
        length, costs = task.lengths[place], task.costs
        options = [
            (draft.load[p.rank] + task.work[place] / costs.speeds[p.rank], i)
            for i, p in enumerate(draft.local)
            if p.left >= length
        ]
        fresh = [
            (draft.load[r] + costs.seconds_per_pass + task.work[place] / costs.speeds[r], r)
            for r in range(costs.ranks)
            if costs.capacity[r] >= length
        ]
        if options and min(options) <= min(fresh):
            end, i = min(options)
            p = draft.local[i]
        else:
            end, r = min(fresh)
            p = LocalPass(r, costs.capacity[r], [])
            draft.local.append(p)
        p.left -= length
        p.places.append(place)
        draft.load[p.rank] = end


class _Packer:
    def __init__(self, task: Task, draft: Draft, target: float) -> None:
        self.task, self.draft, self.target = task, draft, target
        self.open: list[tuple[int, int]] = []
        """(tokens left, index into draft.local) of passes that still take sequences, ascending."""

    def put(self, place: int) -> bool:
        """Into the fullest pass whose rank has the time, else into a new pass on the rank with most time."""
        task, draft, costs = self.task, self.draft, self.task.costs
        length, work = task.lengths[place], task.work[place]
        limit = self.target + 1e-12
        for at in range(bisect_left(self.open, (length, -1)), len(self.open)):
            left, i = self.open[at]
            rank = draft.local[i].rank
            if draft.load[rank] + work / costs.speeds[rank] <= limit:
                del self.open[at]
                self._add(i, place)
                return True
        rank = self._freest(length, work)
        if rank is None or draft.load[rank] + costs.seconds_per_pass + work / costs.speeds[rank] > limit:
            return False
        draft.local.append(LocalPass(rank, costs.capacity[rank], []))
        draft.load[rank] += costs.seconds_per_pass
        self._add(len(draft.local) - 1, place)
        return True

    def _freest(self, length: int, work: float) -> int | None:
        """The rank that would do most speed-weighted seconds more after a new pass with this sequence."""
        costs, load = self.task.costs, self.draft.load
        best, most = None, 0.0
        for rank, room in enumerate(costs.capacity):
            if room >= length:
                rest = self.target - load[rank] - work / costs.speeds[rank]
                if best is None or rest > most:
                    best, most = rank, rest
        return best

    def _add(self, i: int, place: int) -> None:
        p = self.draft.local[i]
        p.left -= self.task.lengths[place]
        p.places.append(place)
        self.draft.load[p.rank] += self.task.work[place] / self.task.costs.speeds[p.rank]
        if p.left:
            insort(self.open, (p.left, i))
