"""Attention over tiles: rectangles of query rows and key rows on one rank, differentiable.

Tensors inside are rows first, (tokens, heads, dim): any range of tokens is then one piece of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.parallel.attention.kernels.block import backward_block, forward_block, merge_into
from heteromesh.parallel.attention.kernels.tiles import Rows, covers_once
from heteromesh.parallel.attention.kernels.tiles import Tile as Tile


def rows_first(x: torch.Tensor) -> torch.Tensor:
    """Returns (1, H, n, D) as (n, H, D), contiguous."""
    return x[0].transpose(0, 1).contiguous()


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """Returns (n, H, D) as (1, H, n, D), a view."""
    return x.transpose(0, 1).unsqueeze(0)


def default_scale(scale: float | None, dim: int) -> float:
    """Returns 1 / sqrt(dim) unless given."""
    return 1.0 / math.sqrt(dim) if scale is None else scale


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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: Tile, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out (rows, H, D), lse (rows, H)) of one tile; q, k and v rows first."""
    keys = slice(t.k0, t.k1)
    out, lse = forward_block(heads_first(q[t.q0 : t.q1]), heads_first(k[keys]), heads_first(v[keys]), t.causal, scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def backward_tile(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    t: Tile,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) of the tile's rows; everything rows first. out and lse: of whole rows, over all keys."""
    rows, keys = slice(t.q0, t.q1), slice(t.k0, t.k1)
    grad, q, k, v, out = (heads_first(x) for x in (grad[rows], q[rows], k[keys], v[keys], out[rows]))
    parts = backward_block(grad, q, k, v, out, lse[rows].transpose(0, 1).unsqueeze(0), t.causal, scale)
    dq, dk, dv = (p[0].transpose(0, 1) for p in parts)
    return dq, dk, dv


def forward_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Sequence[Tile], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, lse), rows first. Every row must be in a tile; two tiles share all of their query rows or none."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=accumulation_dtype(q.dtype), device=q.device)
    for (first, last), group in _by_rows(tiles).items():
        part, part_lse = forward_tile(q, k, v, group[0], scale)
        if len(group) > 1:
            part, part_lse = part.to(lse.dtype), part_lse.clone()
            for tile in group[1:]:
                merge_into(part, part_lse, *forward_tile(q, k, v, tile, scale))
        out[first:last], lse[first:last] = part, part_lse
    return out, lse


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Sequence[Tile], scale: float
    ) -> torch.Tensor:
        q, k, v = (_dense(x[0].transpose(0, 1)) for x in (q, k, v))
        out, lse = forward_tiles(q, k, v, tiles, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return heads_first(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = _dense(grads[0][0].transpose(0, 1))
        dq = RowSum(q, [(t.q0, t.q1) for t in ctx.tiles])
        dk, dv = (RowSum(x, [(t.k0, t.k1) for t in ctx.tiles]) for x in (k, v))
        for t in ctx.tiles:
            parts = backward_tile(grad, q, k, v, out, lse, t, ctx.scale)
            for total, rows, part in zip((dq, dk, dv), _ranges(t), parts, strict=True):
                total.add(rows, part)
        return *(heads_first(total.result()) for total in (dq, dk, dv)), None, None


def tile_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Sequence[Tile], scale: float | None = None
) -> torch.Tensor:
    """Computes attention of q (1, H, Sq, D) over the keys that the tiles name, (1, H, Sq, D); differentiable.

    Tiles with equal query rows are merged; every query row must be in some tile, and no tile may be empty.
    """
    scale = default_scale(scale, q.shape[-1])
    result: torch.Tensor = _TileAttention.apply(q, k, v, tuple(tiles), scale)  # type: ignore[no-untyped-call]
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
