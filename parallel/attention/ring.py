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
from heteromesh.parallel.attention.kernels.sinks import add_sinks, sinks_gradient
from heteromesh.parallel.attention.kernels.tiled import (
    RowSum,
    backward_tile,
    forward_tile,
    forward_tiles,
    heads_first,
)
from heteromesh.parallel.attention.kernels.tiled import rows_first as rows
from heteromesh.parallel.attention.kernels.tiles import Tile, tiles_between
from heteromesh.parallel.attention.layout import rows_of
from heteromesh.parallel.attention.ring_exchange import Block, Circulation, Tensors
from heteromesh.parallel.attention.scoring import Scoring
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.splitting.layout import Layout, Segment
from heteromesh.planner.splitting.masked import masked
from heteromesh.planner.splitting.routes import Kind, schedule


class Ring:
    """The method for one pass (or for one group of heads of a pass)."""

    def __init__(self, exchange: Exchange, layout: Layout, kind: Kind) -> None:
        self._exchange, self._layout, self._kind = exchange, layout, kind
        self._sides: dict[Mask, Side] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        result: torch.Tensor = _RingAttention.apply(q, k, v, self.side(scoring.mask), scoring, sinks)  # type: ignore[no-untyped-call]
        return result

    def side(self, mask: Mask) -> Side:
        """Returns what a call with this mask does."""
        if mask not in self._sides:
            self._sides[mask] = Side(self._exchange, self._layout, self._kind, mask)
        return self._sides[mask]


class Side:
    """One rank's part in a ring with one mask: its rows, the engine with the schedule, and the tiles."""

    def __init__(self, exchange: Exchange, layout: Layout, kind: Kind, mask: Mask) -> None:
        plan = schedule(layout, kind, mask)
        layout, self._mask = masked(layout, mask)
        self._member, self._queries_travel = exchange.member, kind == "token_ring"
        self.own = layout.segments[exchange.member]
        self.circulation = Circulation(exchange, layout, plan)
        self._tiles: dict[tuple[int, tuple[Segment, ...]], tuple[Tile, ...]] = {}

    def is_own(self, block: Block) -> bool:
        """Whether the block is this rank's."""
        return block.origin == self._member

    def tiles(self, block: Block) -> tuple[Tile, ...]:
        """Returns the tiles of own queries and a block of keys; for token_ring of a block of queries and own keys."""
        key = (block.origin, block.segments)
        if key not in self._tiles:
            sides = (block.segments, self.own) if self._queries_travel else (self.own, block.segments)
            self._tiles[key] = tiles_between(*sides, causal=self._mask.causal, window=self._mask.window)
        return self._tiles[key]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ring: Side,
        scoring: Scoring,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        q, kv = rows(q), torch.cat([rows(k), rows(v)], 1)
        out = torch.empty(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        lse = out.new_empty(q.shape[:2])

        def visit(block: Block) -> Tensors:
            keys, values = block.tensors[0].chunk(2, 1)
            tiles = ring.tiles(block)
            if ring.is_own(block):
                first, first_lse = forward_tiles(q, keys, values, tiles, scoring)
                out.copy_(first)
                lse.copy_(first_lse)
                return []
            for t in tiles:
                merge_into(out[t.q0 : t.q1], lse[t.q0 : t.q1], *forward_tile(q, keys, values, t, scoring))
            return []

        if len(q):
            ring.circulation.run([kv], visit, "ring k, v")
        add_sinks(out, lse, sinks)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse, sinks)
        ctx.ring, ctx.scoring = ring, scoring
        return heads_first(result)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, kv, out, lse, sinks = ctx.saved_tensors
        ring, grad = ctx.ring, rows(grads[0])
        dq = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        dkv = torch.zeros(kv.shape, dtype=accumulation_dtype(q.dtype), device=q.device)

        def visit(block: Block) -> Tensors:
            keys, values = block.tensors[0].chunk(2, 1)
            tiles = ring.tiles(block)
            total = RowSum(block.tensors[0], [(t.k0, t.k1) for t in tiles])
            for t in tiles:
                part, *parts = backward_tile(grad, q, keys, values, out, lse, t, ctx.scoring)
                dq[t.q0 : t.q1] += part
                total.add((t.k0, t.k1), *parts)
            if ring.is_own(block):
                dkv.add_(total.total)
                return []
            return [total.result()]

        def deliver(segments: tuple[Segment, ...], parts: Tensors) -> None:
            add_rows(dkv, ring.own, segments, parts[0])

        if len(q):
            ring.circulation.run([kv], visit, "ring k, v backward", [kv], deliver)
        dk, dv = dkv.to(kv.dtype).chunk(2, 1)
        dsinks = sinks_gradient(grad, out, lse, sinks)
        return heads_first(dq.to(q.dtype)), heads_first(dk), heads_first(dv), None, None, dsinks


def add_rows(total: torch.Tensor, own: tuple[Segment, ...], segments: tuple[Segment, ...], part: torch.Tensor) -> None:
    """Adds a part for these segments to the rows of this rank."""
    row = 0
    for a, b in rows_of(own, segments):
        total[a:b] += part[row : row + b - a]
        row += b - a
