"""Ulysses: tokens are traded for heads, each rank attends over whole sequences with some heads, and back.

DeepSpeed-Ulysses (arXiv 2309.14509) for uneven shards, uneven heads and grouped queries: a key head whose query heads
lie on several ranks is sent to each of them, and its gradient is their sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.blocks import Tile, tile_attention
from heteromesh.parallel.layout import Layout


class _AllToAll(torch.autograd.Function):
    """Differentiable exchange of flat pieces; the backward runs the same exchange the other way."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, receive_sizes: Sequence[int], name: str, *sends: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.name, ctx.shapes = exchange, name, [s.shape for s in sends]
        receives = tuple(sends[0].new_empty(n) for n in receive_sizes)
        exchange.all_to_all([s.contiguous().view(-1) for s in sends], receives, name)
        return receives

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        back = [grads[0].new_empty(shape) for shape in ctx.shapes]
        sends = [g.contiguous() for g in grads]
        ctx.exchange.all_to_all(sends, [b.view(-1) for b in back], f"{ctx.name} backward")
        return (None, None, None, *back)


def _trade(
    exchange: Exchange, sends: Sequence[torch.Tensor], receive_sizes: Sequence[int], name: str
) -> tuple[torch.Tensor, ...]:
    received: tuple[torch.Tensor, ...] = _AllToAll.apply(exchange, receive_sizes, name, *sends)  # type: ignore[no-untyped-call]
    return received


class Ulysses:
    """The method for one pass. `heads[i]`: query heads that member i works on (planner.cost.split_heads)."""

    def __init__(self, exchange: Exchange, layout: Layout, heads: Sequence[int], device: torch.device) -> None:
        self._exchange, self._heads = exchange, tuple(heads)
        self._tokens = tuple(layout.tokens(i) for i in range(len(heads)))
        to_members = torch.tensor(layout.order, device=device, dtype=torch.long)
        self._to_members = to_members
        self._to_sequences = torch.empty_like(to_members)
        self._to_sequences[to_members] = torch.arange(len(to_members), device=device)
        self._tiles = tuple(Tile(o, o + n, o, o + n, True) for o, n in zip(layout.offsets, layout.lengths, strict=True))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        group, me = q.shape[1] // k.shape[1], self._exchange.member
        bounds = [sum(self._heads[:i]) for i in range(len(self._heads) + 1)]
        sends = []
        for first, last in itertools.pairwise(bounds):
            keys = slice(first // group, -(-last // group))
            sends.append(torch.cat([q[0, first:last], k[0, keys], v[0, keys]]))
        width, dim = sends[me].shape[0], q.shape[-1]
        sizes = [width * n * dim for n in self._tokens]
        received = _trade(self._exchange, sends, sizes, "ulysses q, k, v")
        parts = [r.view(width, n, dim) for r, n in zip(received, self._tokens, strict=True)]
        whole = torch.cat(parts, 1).index_select(1, self._to_sequences)
        out = self._attend(whole, bounds[me], bounds[me + 1], group, scale)
        return self._give_back(out, q.shape[1])

    def _attend(self, whole: torch.Tensor, first: int, last: int, group: int, scale: float | None) -> torch.Tensor:
        mine = last - first
        kv = (whole.shape[0] - mine) // 2
        q, k, v = whole[:mine], whole[mine : mine + kv], whole[mine + kv :]
        if first % group or last % group:
            owner = torch.arange(first, last, device=q.device) // group - first // group
            k, v = k[owner], v[owner]
        return tile_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), self._tiles, scale)[0]

    def _give_back(self, out: torch.Tensor, heads: int) -> torch.Tensor:
        mine, dim = self._tokens[self._exchange.member], out.shape[-1]
        pieces = out.index_select(1, self._to_members).split(self._tokens, 1)
        received = _trade(self._exchange, pieces, [h * mine * dim for h in self._heads], "ulysses out")
        return torch.cat(received).view(1, heads, mine, dim)
