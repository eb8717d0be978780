"""Which query rows meet which key rows: rectangles that a kernel can run whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from heteromesh.planner.splitting.layout import Segment


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows q0..q1 against keys k0..k1; `causal` tiles are square and see keys up to the diagonal."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    leaving: bool = False
    """Square, and row i sees keys from i on: the earlier ones have left its window."""


Rows = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Placed:
    segment: Segment
    row: int

    @property
    def end(self) -> int:
        return self.row + len(self.segment)

    def part(self, start: int, end: int) -> Rows:
        """Returns the rows of positions start..end of the sequence."""
        return self.row + start - self.segment.start, self.row + end - self.segment.start


def tiles_between(
    queries: Sequence[Segment], keys: Sequence[Segment], *, causal: bool, window: int | None = None
) -> tuple[Tile, ...]:
    """Returns the tiles of a block of queries and a block of keys, each laid out in memory segment by segment.

    Two segments of one sequence must be equal or disjoint. Neighbouring tiles are joined where that is exact. With a
    window (causal) tiles share some of their query rows; rows that see none of the keys are in no tile.
    """
    by_sequence: dict[int, tuple[list[_Placed], list[_Placed]]] = {}
    for side, segments in enumerate((queries, keys)):
        for placed in _placed(segments):
            by_sequence.setdefault(placed.segment.sequence, ([], []))[side].append(placed)
    tiles: list[Tile] = []
    for own, other in by_sequence.values():
        if own and other:
            tiles.extend(_of_sequence(own, other, causal) if window is None else _in_window(own, other, window))
    return tuple(tiles)


def covers_once(ranges: Iterable[Rows], rows: int) -> bool:
    """Whether the ranges cover rows 0..rows exactly once."""
    edges = [0, *(edge for pair in sorted(ranges) for edge in pair), rows]
    return all(edges[i] == edges[i + 1] for i in range(0, len(edges), 2))


def _placed(segments: Sequence[Segment]) -> Iterator[_Placed]:
    row = 0
    for segment in segments:
        yield _Placed(segment, row)
        row += len(segment)


def _of_sequence(queries: list[_Placed], keys: list[_Placed], causal: bool) -> Iterator[Tile]:
    if not causal:
        for rows, columns in itertools.product(_runs(queries), _runs(keys)):
            yield Tile(*rows, *columns, False)
        return
    same = [q.segment for q in queries] == [k.segment for k in keys]
    if same and _rising(queries) and len(_runs(queries)) == len(_runs(keys)) == 1:
        # positions rise with the rows on both sides: the diagonal of the whole block is the causal edge
        yield Tile(*_runs(queries)[0], *_runs(keys)[0], True)
        return
    for rows, ranges in _joined_queries(queries, keys):
        for columns in ranges:
            yield Tile(*rows, *columns, False)
    for q, k in itertools.product(queries, keys):
        if q.segment == k.segment:
            yield Tile(q.row, q.end, k.row, k.end, True)


def _in_window(queries: list[_Placed], keys: list[_Placed], window: int) -> Iterator[Tile]:
    for q, k in itertools.product(_pieces(queries), _pieces(keys)):
        if q.segment != k.segment:
            yield from _leaving(q, q.segment.start, q.segment.end, k, k.segment.start, k.segment.end, window)
            continue
        start, last = q.segment.start, q.segment.end
        for first in range(start, last, window):
            end = min(first + window, last)
            yield Tile(*q.part(first, end), *k.part(first, end), True)
            yield from _leaving(q, first, end, k, max(start, first - window), first, window)


def _leaving(q: _Placed, start: int, end: int, k: _Placed, first: int, last: int, window: int) -> Iterator[Tile]:
    """Yields the tiles of queries at start..end and keys at first..last, which lie before them (or are not seen)."""
    # positions beyond which nothing is seen, on both sides
    end, first = min(end, last + window - 1), max(first, start - window + 1)
    if last > start or end <= start or last <= first:
        return
    # queries up to here see all the keys; from here on each misses one more
    full = min(end, first + window)
    yield Tile(*q.part(start, full), *k.part(first, last), False)
    if full < end:
        yield Tile(*q.part(full, end), *k.part(end - window, last), False)
    if full < end - 1:
        yield Tile(*q.part(full, end - 1), *k.part(full - window + 1, end - window), False, True)


def _pieces(placed: Sequence[_Placed]) -> list[_Placed]:
    """Returns the segments with those joined that are neighbours both in memory and in the sequence."""
    pieces: list[_Placed] = []
    for p in placed:
        if pieces and pieces[-1].end == p.row and pieces[-1].segment.end == p.segment.start:
            last = pieces.pop()
            p = _Placed(Segment(p.segment.sequence, last.segment.start, p.segment.end), last.row)
        pieces.append(p)
    return pieces


def _joined_queries(queries: list[_Placed], keys: list[_Placed]) -> list[tuple[Rows, list[Rows]]]:
    """Returns (query rows, the ranges of keys that lie wholly before them), neighbours with equal ranges as one."""
    joined: list[tuple[Rows, list[Rows]]] = []
    for q in queries:
        before = _runs([k for k in keys if k.segment.end <= q.segment.start])
        if joined and joined[-1][0][1] == q.row and joined[-1][1] == before:
            joined[-1] = ((joined[-1][0][0], q.end), before)
        else:
            joined.append(((q.row, q.end), before))
    return joined


def _rising(placed: Sequence[_Placed]) -> bool:
    return all(a.segment.end <= b.segment.start for a, b in itertools.pairwise(placed))


def _runs(placed: Sequence[_Placed]) -> list[Rows]:
    """Returns the rows of the segments, neighbours in memory as one range."""
    runs: list[Rows] = []
    for p in placed:
        if runs and runs[-1][1] == p.row:
            runs[-1] = (runs[-1][0], p.end)
        else:
            runs.append((p.row, p.end))
    return runs
