"""Layouts of tensors: what planner.layout describes, and moving rows from one layout to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.attention.kernels.tiles import Rows
from heteromesh.planner.splitting.layout import Layout as Layout
from heteromesh.planner.splitting.layout import Segment as Segment
from heteromesh.planner.splitting.layout import layout_of as layout_of


def rows_of(have: Sequence[Segment], wanted: Sequence[Segment]) -> list[Rows]:
    """Returns where the wanted segments lie in a block of the segments `have`, neighbours as one range."""
    row, where = 0, {}
    for segment in have:
        where[segment] = row
        row += len(segment)
    ranges: list[Rows] = []
    for segment in wanted:
        first = where[segment]
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], first + len(segment))
        else:
            ranges.append((first, first + len(segment)))
    return ranges


def pick(block: torch.Tensor, ranges: Sequence[Rows]) -> torch.Tensor:
    """Returns the rows of these ranges, one after the other; no copy where they are one range."""
    if len(ranges) == 1:
        return block[ranges[0][0] : ranges[0][1]]
    return torch.cat([block[a:b] for a, b in ranges]) if ranges else block[:0]


def convert(x: torch.Tensor, old: Layout, new: Layout, exchange: Exchange, name: str = "convert") -> torch.Tensor:
    """Returns the rows of `new` on this member, given those of `old`, (n, ...) both: one all-to-all. Differentiable.

    The layouts must be of the same sequences and members. Raises ValueError where they or the rows don't fit.
    """
    me = exchange.member
    if old.lengths != new.lengths or len(old.segments) != len(new.segments):
        raise ValueError(
            f"a conversion needs two layouts of the same sequences and members, got {len(old.lengths)} sequences on "
            f"{len(old.segments)} members and {len(new.lengths)} on {len(new.segments)}"
        )
    if len(x) != old.tokens(me):
        raise ValueError(f"the old layout holds {old.tokens(me)} tokens on this member, got {len(x)} rows")
    result: torch.Tensor = _Convert.apply(x, old, new, exchange, name)  # type: ignore[no-untyped-call]
    return result


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, old: Layout, new: Layout, exchange: Exchange, name: str) -> torch.Tensor:
        ctx.layouts, ctx.exchange, ctx.name = (new, old), exchange, name
        return _moved(x, old, new, exchange, name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        old, new = ctx.layouts
        return _moved(grads[0], old, new, ctx.exchange, f"{ctx.name} backward"), None, None, None, None


def _moved(x: torch.Tensor, old: Layout, new: Layout, exchange: Exchange, name: str) -> torch.Tensor:
    me = exchange.member
    members = range(len(old.segments))
    sends = [pick(x, [own for own, _ in _common(old.segments[me], new.segments[i])]).contiguous() for i in members]
    # both ends list what they share in the order of the sender's rows
    landing = [[own for _, own in _common(old.segments[i], new.segments[me])] for i in members]
    receives = [x.new_empty(sum(b - a for a, b in rows), *x.shape[1:]) for rows in landing]
    exchange.all_to_all(sends, receives, name)
    result = x.new_empty(new.tokens(me), *x.shape[1:])
    for part, ranges in zip(receives, landing, strict=True):
        row = 0
        for a, b in ranges:
            result[a:b] = part[row : row + b - a]
            row += b - a
    return result


def _common(first: Sequence[Segment], second: Sequence[Segment]) -> Iterator[tuple[Rows, Rows]]:
    """Finds the tokens that both blocks hold: their rows in the first and in the second, in the order of the first."""
    row = 0
    for a in first:
        other = 0
        for b in second:
            start, end = max(a.start, b.start), min(a.end, b.end)
            if a.sequence == b.sequence and start < end:
                yield (row + start - a.start, row + end - a.start), (other + start - b.start, other + end - b.start)
            other += len(b)
        row += len(a)
