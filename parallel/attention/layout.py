"""Layouts of tensors: what planner.layout describes, and moving rows from one layout to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
