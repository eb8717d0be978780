"""What a mask leaves of a layout: who sees whom is then said by sequences, causality and a window alone."""

from __future__ import annotations

import itertools

from heteromesh.planner.model.mask import Mask
from heteromesh.planner.splitting.layout import Layout, Segment


def masked(layout: Layout, mask: Mask) -> tuple[Layout, Mask]:
    """Returns the same rows in the same order, cut where less than a segment is seen, and the mask without chunks.

    Tokens of different chunks never see each other: chunks are sequences of their own.
    """
    if mask.chunk is not None and mask.chunk < max(layout.lengths, default=0):
        layout = _chunked(layout, mask.chunk)
    left = Mask(causal=mask.causal, window=mask.window).within(max(layout.lengths, default=0))
    return (layout if left.window is None else _with_tails(layout, left.window - 1)), left


def sees(queries: Segment, keys: Segment, mask: Mask) -> bool:
    """Returns whether any of the queries sees any of the keys; both of one sequence, equal or disjoint."""
    if mask.causal and keys.start >= queries.end:
        return False
    return mask.window is None or keys.end + mask.window > queries.start + 1


def _chunked(layout: Layout, chunk: int) -> Layout:
    counts = [-(-n // chunk) for n in layout.lengths]
    first = list(itertools.accumulate(counts, initial=0))
    lengths = tuple(min(chunk, n - start) for n in layout.lengths for start in range(0, n, chunk))

    def cut(s: Segment) -> list[Segment]:
        pieces, start = [], s.start
        while start < s.end:
            number = start // chunk
            end = min(s.end, (number + 1) * chunk)
            pieces.append(Segment(first[s.sequence] + number, start - number * chunk, end - number * chunk))
            start = end
        return pieces

    return Layout(lengths, tuple(tuple(piece for s in row for piece in cut(s)) for row in layout.segments))


def _with_tails(layout: Layout, tail: int) -> Layout:
    """Cuts off the end of each segment, the only keys in it that queries after the segment see."""

    def cut(s: Segment) -> list[Segment]:
        if not 0 < tail < len(s):
            return [s]
        return [Segment(s.sequence, s.start, s.end - tail), Segment(s.sequence, s.end - tail, s.end)]

    return Layout(layout.lengths, tuple(tuple(piece for s in row for piece in cut(s)) for row in layout.segments))
