"""Attention over blocks of queries and keys, merged exactly by logsumexp.

Forward: out = sum_i exp(lse_i - lse) out_i with lse = logsumexp_i(lse_i) over the blocks i of a query row. Backward:
a block's flash backward, called with the merged out and lse, gives exact dK, dV of the block and its share of dQ.
Shapes: q (B, H, Sq, D), k and v (B, Hk, Sk, D) with H a multiple of Hk; lse (B, H, Sq) in float32 (or float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows q0..q1 against keys k0..k1; `causal` tiles are square and see keys up to the diagonal."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


def forward_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of one block. Neither side may be empty: torch's CPU kernel dies on that."""
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    return _math_forward(q, k, v, causal, scale)


def backward_block(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of one block, given the out and lse of the whole rows."""
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return dq, dk, dv
    return _math_backward(grad, q, k, v, out, lse, causal, scale)


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """(B, Hk, G, Sq, Sk) scaled scores, G query heads per key head, at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, k.to(wide)) * scale
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(mask, -math.inf)
    return scores


def _math_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    out = torch.einsum("bhgqk,bhkd->bhgqd", weights, v.to(weights.dtype)).flatten(1, 2)
    return out.to(q.dtype), lse.flatten(1, 2)


def _math_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, groups = _scores(q, k, causal, scale), (k.shape[1], -1)
    wide = scores.dtype
    weights = (scores - lse.unflatten(1, groups).unsqueeze(-1)).exp()
    g = grad.unflatten(1, groups).to(wide)
    delta = (g * out.unflatten(1, groups).to(wide)).sum(-1, keepdim=True)
    dv = torch.einsum("bhgqk,bhgqd->bhkd", weights, g)
    ds = weights * (torch.einsum("bhgqd,bhkd->bhgqk", g, v.to(wide)) - delta) * scale
    dq = torch.einsum("bhgqk,bhkd->bhgqd", ds, k.to(wide)).flatten(1, 2)
    dk = torch.einsum("bhgqk,bhgqd->bhkd", ds, q.unflatten(1, groups).to(wide))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Sequence[Tile], scale: float
    ) -> torch.Tensor:
        batch, heads, rows, dim = q.shape
        # (B, S, H, D) in memory, so that the caller's move of heads behind tokens costs nothing
        out = q.new_empty(batch, rows, heads, dim).transpose(1, 2)
        lse = q.new_empty(batch, rows, heads, dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
        for row, group in _by_rows(tiles).items():
            merged = [_run(q, k, v, t, scale) for t in group]
            part, part_lse = merged[0] if len(merged) == 1 else _merge(merged)
            out[:, :, row[0] : row[1]], lse[:, :, row[0] : row[1]] = part, part_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for t in ctx.tiles:
            rows, keys = slice(t.q0, t.q1), slice(t.k0, t.k1)
            parts = backward_block(
                grad[:, :, rows],
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, rows],
                lse[:, :, rows],
                t.causal,
                ctx.scale,
            )
            for total, where, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
                total[:, :, where] += part
        return dq, dk, dv, None, None


def tile_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Sequence[Tile], scale: float | None = None
) -> torch.Tensor:
    """Attention of q over the keys that the tiles name, (B, H, Sq, D); differentiable.

    Tiles with equal query rows are merged; every query row must be in some tile, and no tile may be empty.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    result: torch.Tensor = _TileAttention.apply(q, k, v, tuple(tiles), scale)  # type: ignore[no-untyped-call]
    return result


def _by_rows(tiles: Sequence[Tile]) -> dict[tuple[int, int], list[Tile]]:
    rows: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        rows.setdefault((tile.q0, tile.q1), []).append(tile)
    return rows


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: Tile, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return forward_block(q[:, :, t.q0 : t.q1], k[:, :, t.k0 : t.k1], v[:, :, t.k0 : t.k1], t.causal, scale)


def _merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    stacked = torch.stack([lse for _, lse in parts])
    lse = stacked.logsumexp(0)
    out = sum(part * (one - lse).exp().unsqueeze(-1) for part, one in parts)
    assert isinstance(out, torch.Tensor)
    return out, lse
