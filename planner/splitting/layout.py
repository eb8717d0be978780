"""Which tokens of which sequence each rank of a pass holds: contiguous, zigzag (also uneven), or zigzag by groups.

One description for all of them: a list of segments per member, in the order in which they lie in memory. Members may
hold nothing, and a sequence may live on some of the members only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from heteromesh.errors import UserError
from heteromesh.planner.plan import Pass

METHODS = ("local", "ulysses", "gather", "ring", "trimmed_ring", "bidirectional_ring", "token_ring", "ulysses_ring")
"""All ways to split a sequence. `ulysses_ring:4` says how many neighbouring ranks share heads (see inner_degree)."""


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
        """Returns tokens that a member holds."""
        return sum(len(s) for s in self.segments[member])

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sequence starts when all of them lie one after the other."""
        return tuple(itertools.accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def order(self) -> list[int]:
        """Place in sequence order of every token, the tokens listed member by member."""
        return [
            self.offsets[s.sequence] + t for segments in self.segments for s in segments for t in range(s.start, s.end)
        ]


def contiguous(lengths: Sequence[int], shards: Sequence[Sequence[int]]) -> Layout:
    """Cuts each sequence into one piece a member, in member order. shards[i][j]: tokens of sequence j on member
    i.
    """
    members: list[list[Segment]] = [[] for _ in shards]
    for j in range(len(lengths)):
        start = 0
        for i, row in enumerate(shards):
            if row[j]:
                members[i].append(Segment(j, start, start + row[j]))
            start += row[j]
    return Layout(tuple(lengths), tuple(map(tuple, members)))


def zigzag(lengths: Sequence[int], shards: Sequence[Sequence[int]]) -> Layout:
    """Gives each member a piece of the head of each sequence and the mirrored piece of its tail.

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


def grouped(lengths: Sequence[int], shards: Sequence[Sequence[int]], inner: int) -> Layout:
    """Returns groups of `inner` neighbouring members in zigzag; inside a group the group's tokens in member order."""
    outer = group_layout(lengths, shards, inner)
    members: list[list[Segment]] = [[] for _ in shards]
    for group, segments in enumerate(outer.segments):
        for j in range(len(lengths)):
            pieces = [s for s in segments if s.sequence == j]
            for i in range(group * inner, (group + 1) * inner):
                taken, pieces = _take(pieces, shards[i][j])
                members[i].extend(taken)
    return Layout(tuple(lengths), tuple(map(tuple, members)))


def group_layout(lengths: Sequence[int], shards: Sequence[Sequence[int]], inner: int) -> Layout:
    """Returns the zigzag layout whose members are the groups of `inner` neighbours."""
    groups = [shards[i : i + inner] for i in range(0, len(shards), inner)]
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in groups]
    return zigzag(lengths, sums)


def layout_of(plan: Pass, lengths: Sequence[int]) -> Layout:
    """Returns the layout that the pass's method works on; lengths[j] is that of the pass's j-th sequence."""
    return method_layout(plan.method, lengths, plan.shards)


def method_layout(method: str, lengths: Sequence[int], shards: Sequence[Sequence[int]]) -> Layout:
    """Returns what `layout_of` does. Raises UserError for an unknown method."""
    name = base_name(method)
    if name in ("local", "ulysses"):
        return contiguous(lengths, shards)
    if name == "ulysses_ring":
        return grouped(lengths, shards, inner_degree(method, len(shards)))
    return zigzag(lengths, shards)


def base_name(method: str) -> str:
    """Returns the method without its degree. Raises UserError for an unknown one."""
    name, colon, _ = method.partition(":")
    if name not in METHODS or (colon and name != "ulysses_ring"):
        raise UserError(f"unknown method {method!r}: use one of {', '.join(METHODS)}, or ulysses_ring:DEGREE")
    return name


def inner_degree(method: str, members: int) -> int:
    """Returns how many neighbouring members share heads under `ulysses_ring[:DEGREE]`; the groups of them form the
    ring.

    Without a degree, the largest divisor of `members` up to its square root. Raises UserError for one that is no
    divisor.
    """
    _, colon, text = method.partition(":")
    if not colon:
        return max(d for d in range(1, math.isqrt(members) + 1) if members % d == 0)
    if not text.isdecimal() or not int(text) or members % int(text):
        raise UserError(f"method {method!r} on {members} ranks: the degree must be a whole number that divides them")
    return int(text)


def _take(pieces: Sequence[Segment], tokens: int) -> tuple[list[Segment], list[Segment]]:
    """Returns the first `tokens` tokens of the pieces, and the rest."""
    taken: list[Segment] = []
    rest: list[Segment] = []
    for piece in pieces:
        cut = min(len(piece), tokens)
        tokens -= cut
        if cut:
            taken.append(Segment(piece.sequence, piece.start, piece.start + cut))
        if cut < len(piece):
            rest.append(Segment(piece.sequence, piece.start + cut, piece.end))
    return taken, rest


def _joined(row: Sequence[Segment]) -> tuple[Segment, ...]:
    """Joins neighbouring segments of one sequence."""
    joined: list[Segment] = []
    for segment in row:
        if joined and joined[-1].sequence == segment.sequence and joined[-1].end == segment.start:
            joined[-1] = Segment(segment.sequence, joined[-1].start, segment.end)
        else:
            joined.append(segment)
    return tuple(joined)
