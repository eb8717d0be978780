"""Who holds which part of tensors that are dealt out: uneven ranges of every bucket, in one copy or in several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

Range = tuple[int, int]
"""[start, stop) of a tensor's elements."""


class LostState(RuntimeError):
    """All copies of a part are gone: no members can go on from here, but a checkpoint can."""


def split_bounds(fractions: Sequence[float], numel: int) -> tuple[int, ...]:
    """Returns len(fractions) + 1 offsets: part i of `numel` elements is [offsets[i], offsets[i + 1]), maybe empty."""
    sums = list(accumulate(fractions))
    return (0, *(round(s / sums[-1] * numel) for s in sums))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """The i-th member owns range i of every bucket; with two copies it also mirrors range i + stride (counted round).

    So it takes the loss of both at once to lose anything. Without members nobody has dealt anything out, as
    when a job begins: everybody holds everything, which is one range.
    """

    fractions: tuple[float, ...] = ()
    """What each member owns; only their ratios count."""
    members: tuple[int, ...] = ()
    """Ids in rank order; in a fixed world 0 to size - 1."""
    copies: int = 1
    """How many members hold each range, where there are as many."""
    names: tuple[str, ...] = ()
    """What people call each member; empty: ids are told."""
    stride: int = 1
    """How many members further a copy is: neighbours may be on one host, and be lost with it."""
    what: str = "the optimizer state"
    """What is dealt out, for sentences."""

    def __post_init__(self) -> None:
        if len(self.fractions) != len(self.members) or len(self.names) not in (0, len(self.members)):
            raise ValueError(
                f"{len(self.fractions)} fractions and {len(self.names)} names for {len(self.members)} members: "
                "give one a member"
            )
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"the members {self.members} are not all different: give each an id of its own")
        if self.copies < 1:
            raise ValueError(f"{self.copies} copies hold nothing: give at least 1")
        if self.members and len(set(self.holders(0))) < min(self.copies, len(self.members)):
            raise ValueError(f"stride {self.stride} gives one of {len(self.members)} members two copies: give another")
        if self.members and not (min(self.fractions) >= 0 and 0 < sum(self.fractions) < math.inf):
            raise ValueError(f"the fractions are {self.fractions}: none may be negative and one must be above zero")

    @classmethod
    def whole(cls) -> Ownership:
        """Returns what a job begins with: nothing is dealt out."""
        return cls()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is dealt out."""
        return not self.members

    def bounds(self, numel: int) -> tuple[int, ...]:
        """Returns where the ranges of a bucket of so many elements begin, and where the last one ends."""
        return split_bounds(self.fractions or (1.0,), numel)

    def ranges(self, numel: int) -> tuple[Range, ...]:
        """Returns the ranges of a bucket of so many elements; some may be empty."""
        return tuple(pairwise(self.bounds(numel)))

    def holders(self, index: int) -> tuple[int, ...]:
        """Returns the owner of a range and, with more copies, who mirrors it; of what is not dealt out nobody's id."""
        if self.is_whole:
            return ()
        count = len(self.members)
        return tuple(self.members[(index - copy * self.stride) % count] for copy in range(min(self.copies, count)))

    def holds(self, member: int, index: int) -> bool:
        """Returns whether a member has a copy of a range."""
        return self.is_whole or member in self.holders(index)

    def held_by(self, member: int) -> tuple[int, ...]:
        """Returns the indices of the ranges that a member has a copy of, without those that are always empty."""
        if self.is_whole:
            return (0,)
        return tuple(i for i, share in enumerate(self.fractions) if share and member in self.holders(i))

    def ranges_held_by(self, member: int, numel: int) -> list[Range]:
        """Returns those ranges of a bucket of so many elements that a member has a copy of and that are not empty."""
        ranges = self.ranges(numel)
        return [ranges[i] for i in self.held_by(member) if ranges[i][0] < ranges[i][1]]

    def sources(self, members: Sequence[int]) -> list[int]:
        """Returns by range who of these members hands it to the others: its owner, or its mirror where that is gone.

        An empty range without holders is the first member's. Raises LostState where all holders of a range are gone.
        """
        if self.is_whole:
            return [members[0]]
        found = []
        for index, share in enumerate(self.fractions):
            source = next((m for m in self.holders(index) if m in members), None)
            if source is None and share:
                raise LostState(self._loss(self.holders(index)))
            found.append(members[0] if source is None else source)
        return found

    def _loss(self, holders: Sequence[int]) -> str:
        names = [self.names[self.members.index(m)] if self.names else f"member {m}" for m in holders]
        if len(names) == 1:
            return f"{names[0]} was lost, and with it the only copy of a part of {self.what}"
        copies = "both" if len(names) == 2 else f"all {len(names)}"
        return f"{' and '.join(names)} were lost at once, and with them {copies} copies of a part of {self.what}"


def stride_between(hosts: Sequence[str]) -> int:
    """Returns the least `stride` with which most ranges have their copies on two hosts. hosts: by member."""
    count = len(hosts)
    apart = {s: sum(hosts[i] != hosts[i - s] for i in range(count)) for s in range(1, count)}
    return max(apart, key=lambda stride: (apart[stride], -stride), default=1)
