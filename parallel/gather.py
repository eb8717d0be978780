"""Gather: every rank collects the keys and values of the pass and attends with its own queries.

Context parallelism of Llama 3 (arXiv 2407.21783, section 3.3.2), with zigzag shards of any size: one softmax a row,
at most two tiles a segment. The backward sends each rank's key and value gradients home, where they are summed in
member order in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.blocks import Tile, tile_attention
from heteromesh.parallel.layout import Layout


class _AllGather(torch.autograd.Function):
    """(2, Hk, n, D) of every member, joined along the tokens in member order."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, tokens: tuple[int, ...], kv: torch.Tensor) -> torch.Tensor:
        ctx.exchange, ctx.tokens = exchange, tokens
        own = kv.contiguous()
        parts = [kv.new_empty(*kv.shape[:2], n, kv.shape[3]) for n in tokens]
        exchange.all_to_all([own] * len(tokens), parts, "gather k, v")
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        sends = [g.contiguous() for g in grads[0].split(ctx.tokens, 2)]
        own = sends[ctx.exchange.member]
        parts = [torch.empty_like(own) for _ in ctx.tokens]
        ctx.exchange.all_to_all(sends, parts, "gather k, v backward")
        wide = torch.promote_types(own.dtype, torch.float32)
        total = torch.zeros(own.shape, dtype=wide, device=own.device)
        for part in parts:
            total += part
        return None, None, total.to(own.dtype)


class Gather:
    """The method for one pass."""

    def __init__(self, exchange: Exchange, layout: Layout, device: torch.device) -> None:
        self._exchange = exchange
        self._tokens = tuple(layout.tokens(i) for i in range(len(layout.segments)))
        to_members = torch.tensor(layout.order, device=device, dtype=torch.long)
        self._to_sequences = torch.empty_like(to_members)
        self._to_sequences[to_members] = torch.arange(len(to_members), device=device)
        self._tiles = _tiles(layout, exchange.member)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        kv = torch.stack([k[0], v[0]])
        gathered: torch.Tensor = _AllGather.apply(self._exchange, self._tokens, kv)  # type: ignore[no-untyped-call]
        keys, values = gathered.index_select(2, self._to_sequences)
        return tile_attention(q, keys.unsqueeze(0), values.unsqueeze(0), self._tiles, scale)


def _tiles(layout: Layout, member: int) -> tuple[Tile, ...]:
    """Each segment sees the whole of its sequence before it, and itself causally."""
    tiles, row = [], 0
    for segment in layout.segments[member]:
        end, first = row + len(segment), layout.offsets[segment.sequence]
        if segment.start:
            tiles.append(Tile(row, end, first, first + segment.start, False))
        tiles.append(Tile(row, end, first + segment.start, first + segment.end, True))
        row = end
    return tuple(tiles)
