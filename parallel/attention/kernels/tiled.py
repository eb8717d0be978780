"""Attention over tiles: rectangles of query rows and key rows on one rank, differentiable.

Tensors inside are rows first, (tokens, heads, dim): any range of tokens is then one piece of memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.parallel.attention.kernels.block import backward_block, forward_block, merge_into
from heteromesh.parallel.attention.kernels.sinks import add_sinks, sinks_gradient
from heteromesh.parallel.attention.kernels.tiles import Rows, covers_once
from heteromesh.parallel.attention.kernels.tiles import Tile as Tile
from heteromesh.parallel.attention.scoring import Scoring


def rows_first(x: torch.Tensor) -> torch.Tensor:
    """Returns (1, H, n, D) as (n, H, D), contiguous."""
    return x[0].transpose(0, 1).contiguous()


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """Returns (n, H, D) as (1, H, n, D), a view."""
    return x.transpose(0, 1).unsqueeze(0)


class RowSum:
    """Adds up parts that each belong to a range of rows; in a wide dtype unless every row gets exactly one part."""

    def __init__(self, like: torch.Tensor, ranges: Iterable[Rows]) -> None:
        """like: (n, ...), for shape, dtype and device. ranges: those of all parts to come."""
        self._dtype, self._once = like.dtype, covers_once(ranges, len(like))
        self.total = (
            torch.empty(like.shape, dtype=like.dtype, device=like.device)
            if self._once
            else torch.zeros(like.shape, dtype=accumulation_dtype(like.dtype), device=like.device)
        )

    def add(self, rows: Rows, *parts: torch.Tensor) -> None:
        """Adds (or writes) what the parts are when they are joined along the second dimension."""
        column = 0
        for part in parts:
            mine = self.total[rows[0] : rows[1], column : column + part.shape[1]]
            column += part.shape[1]
            if self._once:
                mine.copy_(part)
            else:
                mine += part

    def result(self) -> torch.Tensor:
        """Returns the sums in the dtype of `like`."""
        return self.total.to(self._dtype)


def forward_tile(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: Tile, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out (rows, H, D), lse (rows, H)) of one tile; q, k and v rows first."""
    keys = slice(t.k0, t.k1)
    queries, seen, values = (heads_first(_turned(x, t)) for x in (q[t.q0 : t.q1], k[keys], v[keys]))
    causal = t.causal or t.leaving
    out, lse = forward_block(queries, seen, values, causal, scoring.scale, scoring.softcap)
    return _turned(out[0].transpose(0, 1), t), _turned(lse[0].transpose(0, 1), t)


def backward_tile(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    t: Tile,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) of the tile's rows; everything rows first. out and lse: of whole rows, over all keys."""
    rows, keys = slice(t.q0, t.q1), slice(t.k0, t.k1)
    grad, q, k, v, out = (heads_first(_turned(x, t)) for x in (grad[rows], q[rows], k[keys], v[keys], out[rows]))
    lse, causal = _turned(lse[rows], t).transpose(0, 1).unsqueeze(0), t.causal or t.leaving
    parts = backward_block(grad, q, k, v, out, lse, causal, scoring.scale, scoring.softcap)
    dq, dk, dv = (_turned(p[0].transpose(0, 1), t) for p in parts)
    return dq, dk, dv


def _turned(x: torch.Tensor, t: Tile) -> torch.Tensor:
    """Returns the rows of a tile that keys leave in reverse order, in which it is causal."""
    return x.flip(0) if t.leaving else x


def forward_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Sequence[Tile], scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, lse), rows first; rows in no tile have out 0 and lse -inf."""
    groups = _by_rows(tiles)
    wide = accumulation_dtype(q.dtype)
    if not _disjoint(groups):
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = out.new_full(q.shape[:2], -math.inf)
        for t in tiles:
            merge_into(out[t.q0 : t.q1], lse[t.q0 : t.q1], *forward_tile(q, k, v, t, scoring))
        return out.to(q.dtype), lse
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:2], -math.inf, dtype=wide, device=q.device)
    for (first, last), group in groups.items():
        part, part_lse = forward_tile(q, k, v, group[0], scoring)
        if len(group) > 1:
            part, part_lse = part.to(wide), part_lse.clone()
            for tile in group[1:]:
                merge_into(part, part_lse, *forward_tile(q, k, v, tile, scoring))
        out[first:last], lse[first:last] = part, part_lse
    return out, lse


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tiles: Sequence[Tile],
        scoring: Scoring,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        q, k, v = (_dense(x[0].transpose(0, 1)) for x in (q, k, v))
        out, lse = forward_tiles(q, k, v, tiles, scoring)
        add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.tiles, ctx.scoring = tiles, scoring
        return heads_first(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        grad = _dense(grads[0][0].transpose(0, 1))
        dq = RowSum(q, [(t.q0, t.q1) for t in ctx.tiles])
        dk, dv = (RowSum(x, [(t.k0, t.k1) for t in ctx.tiles]) for x in (k, v))
        for t in ctx.tiles:
            parts = backward_tile(grad, q, k, v, out, lse, t, ctx.scoring)
            for total, rows, part in zip((dq, dk, dv), _ranges(t), parts, strict=True):
                total.add(rows, part)
        gradients = (heads_first(total.result()) for total in (dq, dk, dv))
        return *gradients, None, None, sinks_gradient(grad, out, lse, sinks)


def tile_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Sequence[Tile],
    scoring: Scoring,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes attention of q (1, H, Sq, D) over the keys that the tiles name, (1, H, Sq, D); differentiable.

    Tiles that share query rows are merged; every query row must be in some tile, and no tile may be empty.
    sinks (H,): see `add_sinks`.
    """
    result: torch.Tensor = _TileAttention.apply(q, k, v, tuple(tiles), scoring, sinks)  # type: ignore[no-untyped-call]
    return result


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _ranges(t: Tile) -> tuple[Rows, Rows, Rows]:
    return (t.q0, t.q1), (t.k0, t.k1), (t.k0, t.k1)


def _by_rows(tiles: Sequence[Tile]) -> dict[Rows, list[Tile]]:
    rows: dict[Rows, list[Tile]] = {}
    for tile in tiles:
        rows.setdefault((tile.q0, tile.q1), []).append(tile)
    return rows


def _disjoint(ranges: Iterable[Rows]) -> bool:
    return all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(ranges)))
