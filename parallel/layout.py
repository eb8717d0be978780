"""Which tokens of which sequence each rank of a pass holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from heteromesh.planner.plan import Pass


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end (excluded) of the pass's `sequence`-th sequence."""

    sequence: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Layout:
    """segments[i]: what member i of the pass holds, in the order in which its tokens lie in memory."""

    lengths: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]

    def tokens(self, member: int) -> int:
        """Tokens that a member holds."""
        return sum(len(s) for s in self.segments[member])

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sequence starts when all of them lie one after the other."""
        return tuple(sum(self.lengths[:j]) for j in range(len(self.lengths)))

    @cached_property
    def order(self) -> list[int]:
        """Place in sequence order of every token, the tokens listed member by member."""
        return [
            self.offsets[s.sequence] + t for segments in self.segments for s in segments for t in range(s.start, s.end)
        ]


def contiguous(lengths: Sequence[int], shards: Sequence[Sequence[int]]) -> Layout:
    """Each sequence cut into one piece a member, in member order. shards[i][j]: tokens of sequence j on member i."""
    members: list[list[Segment]] = [[] for _ in shards]
    for j in range(len(lengths)):
        start = 0
        for i, row in enumerate(shards):
            if row[j]:
                members[i].append(Segment(j, start, start + row[j]))
            start += row[j]
    return Layout(tuple(lengths), tuple(map(tuple, members)))


def zigzag(lengths: Sequence[int], shards: Sequence[Sequence[int]]) -> Layout:
    """Each member holds a piece of the head of each sequence and the mirrored piece of its tail.

    With w tokens at [x, x + w/2) and mirrored, the causal work is w * length / 2 wherever x lies: work follows
    tokens, also for unequal shards.
    """
    members: list[list[Segment]] = [[] for _ in shards]
    for j, length in enumerate(lengths):
        head, tail = 0, length
        for i, row in enumerate(shards):
            first = (row[j] + 1) // 2
            second = row[j] - first
            if first:
                members[i].append(Segment(j, head, head + first))
            if second:
                members[i].append(Segment(j, tail - second, tail))
            head, tail = head + first, tail - second
    return Layout(tuple(lengths), tuple(_joined(row) for row in members))


def layout_of(plan: Pass, lengths: Sequence[int]) -> Layout:
    """The layout that the pass's method works on; lengths[j] is that of the pass's j-th sequence."""
    build = zigzag if plan.method == "gather" else contiguous
    return build(lengths, plan.shards)


def _joined(row: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbouring segments of one sequence as one."""
    joined: list[Segment] = []
    for segment in row:
        if joined and joined[-1].sequence == segment.sequence and joined[-1].end == segment.start:
            joined[-1] = Segment(segment.sequence, joined[-1].start, segment.end)
        else:
            joined.append(segment)
    return tuple(joined)
