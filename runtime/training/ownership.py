"""Who holds which part of a sharded optimizer's state in a job of changing members: uneven ranges, each held twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from heteromesh.faults.membership.view import Stopped, View

Range = tuple[int, int]
"""[start, stop) of the elements of all trained parameters, counted through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The i-th member owns range i and mirrors range i + 1 (the last one range 0), so that it takes the loss of two
    neighbours at once to lose anything. Without members: everybody holds everything, as when a job begins."""

    bounds: tuple[int, ...]
    """Where the ranges begin, and where the last one ends."""
    members: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, view: View, speeds: Sequence[float], count: int) -> Layout:
        """`count` elements for the members of an epoch, in proportion to their speeds; the same on every member."""
        sums = list(accumulate(map(float, speeds), initial=0.0))
        bounds = [min(count, round(count * part / sums[-1])) for part in sums[:-1]]
        return cls(bounds=(*bounds, count), members=view.members, names=view.names)

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Some may be empty."""
        return tuple(pairwise(self.bounds))

    def holders(self, index: int) -> tuple[int, ...]:
        """Owner and mirror of a range."""
        return self.members[index], self.members[index - 1]

    def holds(self, member: int, index: int) -> bool:
        return not self.members or member in self.holders(index)

    def held_by(self, member: int) -> list[Range]:
        """The ranges that are not empty."""
        return [r for i, r in enumerate(self.ranges) if r[0] < r[1] and self.holds(member, i)]

    def sources(self, members: Sequence[int]) -> list[int]:
        """By range, who of these members hands it to the others: its owner, or its mirror when the owner is gone.

        Raises Stopped when both are.
        """
        if not self.members:
            return [members[0]]
        found = []
        for index, (start, stop) in enumerate(self.ranges):
            holders = self.holders(index)
            source = next((m for m in holders if m in members), None)
            if source is None and start < stop:
                names = " and ".join(self.names[self.members.index(m)] for m in dict.fromkeys(holders))
                raise Stopped(f"{names} were lost at once, and with them both copies of a part of the optimizer state")
            found.append(members[0] if source is None else source)
        return found
