"""Ring attention: queries stay, blocks of keys and values travel.

Ring Attention (arXiv 2310.01889) with zigzag shards of any size; `planner.routes` says which of its forms (plain,
trimmed, bidirectional). The backward sends keys and values round once more, and each rank's share of their gradients
straight home, where they are summed in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.attention.kernels.block import merge_into
from heteromesh.parallel.attention.kernels.tiled import (
    RowSum,
    backward_tile,
    default_scale,
    forward_tile,
    forward_tiles,
    heads_first,
)
from heteromesh.parallel.attention.kernels.tiled import rows_first as rows
from heteromesh.parallel.attention.kernels.tiles import Tile, tiles_between
from heteromesh.parallel.attention.layout import rows_of
from heteromesh.parallel.attention.ring_exchange import Block, Circulation, Tensors
from heteromesh.planner.splitting.layout import Layout, Segment
from heteromesh.planner.splitting.routes import Kind, schedule


class Ring:
    """The method for one pass (or for one group of heads of a pass)."""

    def __init__(self, exchange: Exchange, layout: Layout, kind: Kind) -> None:
        self._exchange, self._layout, self._kind = exchange, layout, kind
        self._circulations: dict[bool, Circulation] = {}
        self._tiles: dict[tuple[int, tuple[Segment, ...], bool], tuple[Tile, ...]] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool = True
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        scale = default_scale(scale, q.shape[-1])
        result: torch.Tensor = _RingAttention.apply(q, k, v, self, scale, causal)  # type: ignore[no-untyped-call]
        return result

    @property
    def own(self) -> tuple[Segment, ...]:
        """This rank's segments."""
        return self._layout.segments[self._exchange.member]

    def is_own(self, block: Block) -> bool:
        """Whether the block is this rank's."""
        return block.origin == self._exchange.member

    def circulation(self, causal: bool) -> Circulation:
        """Returns the engine with this method's schedule."""
        if causal not in self._circulations:
            plan = schedule(self._layout, self._kind, causal=causal)
            self._circulations[causal] = Circulation(self._exchange, self._layout, plan)
        return self._circulations[causal]

    def tiles(self, block: Block, causal: bool) -> tuple[Tile, ...]:
        """Returns the tiles of own queries and a block of keys; for token_ring of a block of queries and own keys."""
        key = (block.origin, block.segments, causal)
        if key not in self._tiles:
            sides = (self.own, block.segments) if self._kind != "token_ring" else (block.segments, self.own)
            self._tiles[key] = tiles_between(*sides, causal=causal)
        return self._tiles[key]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Ring, scale: float, causal: bool
    ) -> torch.Tensor:
        q, kv = rows(q), torch.cat([rows(k), rows(v)], 1)
        out = torch.empty(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        lse = out.new_empty(q.shape[:2])

        def visit(block: Block) -> Tensors:
            keys, values = block.tensors[0].chunk(2, 1)
            tiles = ring.tiles(block, causal)
            if ring.is_own(block):
                first, first_lse = forward_tiles(q, keys, values, tiles, scale)
                out.copy_(first)
                lse.copy_(first_lse)
                return []
            for t in tiles:
                merge_into(out[t.q0 : t.q1], lse[t.q0 : t.q1], *forward_tile(q, keys, values, t, scale))
            return []

        if len(q):
            ring.circulation(causal).run([kv], visit, "ring k, v")
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse)
        ctx.ring, ctx.scale, ctx.causal = ring, scale, causal
        return heads_first(result)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, kv, out, lse = ctx.saved_tensors
        ring, grad = ctx.ring, rows(grads[0])
        dq = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        dkv = torch.zeros(kv.shape, dtype=accumulation_dtype(q.dtype), device=q.device)

        def visit(block: Block) -> Tensors:
            keys, values = block.tensors[0].chunk(2, 1)
            tiles = ring.tiles(block, ctx.causal)
            total = RowSum(block.tensors[0], [(t.k0, t.k1) for t in tiles])
            for t in tiles:
                part, *parts = backward_tile(grad, q, keys, values, out, lse, t, ctx.scale)
                dq[t.q0 : t.q1] += part
                total.add((t.k0, t.k1), *parts)
            if ring.is_own(block):
                dkv.add_(total.total)
                return []
            return [total.result()]

        def deliver(segments: tuple[Segment, ...], parts: Tensors) -> None:
            add_rows(dkv, ring.own, segments, parts[0])

        if len(q):
            ring.circulation(ctx.causal).run([kv], visit, "ring k, v backward", [kv], deliver)
        dk, dv = dkv.to(kv.dtype).chunk(2, 1)
        return heads_first(dq.to(q.dtype)), heads_first(dk), heads_first(dv), None, None, None


def add_rows(total: torch.Tensor, own: tuple[Segment, ...], segments: tuple[Segment, ...], part: torch.Tensor) -> None:
    """Adds a part for these segments to the rows of this rank."""
    row = 0
    for a, b in rows_of(own, segments):
        total[a:b] += part[row : row + b - a]
        row += b - a
