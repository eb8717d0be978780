"""Ulysses: tokens are traded for heads, each rank attends over whole sequences with some heads, and back.

DeepSpeed-Ulysses (arXiv 2309.14509) for uneven shards, uneven heads and grouped queries: a key head whose query heads
lie on several ranks is sent to each of them, and its gradient is their sum. `UlyssesRing` trades inside groups of
neighbouring ranks and runs a ring of keys among the groups (USP, arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.blocks import tile_attention
from heteromesh.parallel.ring import Ring
from heteromesh.parallel.tiles import Tile
from heteromesh.planner.heads import HeadShare, head_shares
from heteromesh.planner.layout import Layout

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None, bool], torch.Tensor]


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


class Trade:
    """Tokens for heads and back, around an attention that sees all tokens of the exchange's members."""

    def __init__(
        self, exchange: Exchange, tokens: Sequence[int], order: Sequence[int], speeds: Sequence[float]
    ) -> None:
        """tokens[i]: of member i. order: where `attend` wants each token, the tokens listed member by member."""
        self._exchange, self._tokens, self._speeds = exchange, tuple(tokens), tuple(speeds)
        self._to_members = torch.tensor(order, device=exchange.device, dtype=torch.long)
        self._to_sequences = torch.empty_like(self._to_members)
        self._to_sequences[self._to_members] = torch.arange(len(order), device=exchange.device)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool, attend: Attend
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        shares = head_shares(q.shape[1], k.shape[1], self._speeds)
        mine = shares[self._exchange.member]
        sends = []
        for share in shares:
            keys = slice(share.first_key, share.last_key)
            sends.append(torch.cat([q[0, share.first : share.last], k[0, keys], v[0, keys]]))
        width, dim = mine.queries + 2 * mine.keys, q.shape[-1]
        received = _trade(self._exchange, sends, [width * n * dim for n in self._tokens], "ulysses q, k, v")
        parts = [r.view(width, n, dim) for r, n in zip(received, self._tokens, strict=True)]
        whole = torch.cat(parts, 1).index_select(1, self._to_sequences)
        operands = _operands(whole, mine, q.shape[1] // k.shape[1])
        return self._give_back(attend(*operands, scale, causal)[0], shares)

    def _give_back(self, out: torch.Tensor, shares: Sequence[HeadShare]) -> torch.Tensor:
        mine, dim = self._tokens[self._exchange.member], out.shape[-1]
        pieces = out.index_select(1, self._to_members).split(self._tokens, 1)
        received = _trade(self._exchange, pieces, [s.queries * mine * dim for s in shares], "ulysses out")
        return torch.cat(received).view(1, sum(s.queries for s in shares), mine, dim)


def _operands(whole: torch.Tensor, mine: HeadShare, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = whole.split([mine.queries, mine.keys, mine.keys])
    if not mine.aligned:
        owner = torch.arange(mine.first, mine.last, device=q.device) // group - mine.first_key
        k, v = k[owner], v[owner]
    return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)


class Ulysses:
    """The method for one pass. speeds[i]: of member i."""

    def __init__(self, exchange: Exchange, layout: Layout, speeds: Sequence[float]) -> None:
        tokens = [layout.tokens(i) for i in range(len(layout.segments))]
        self._trade = Trade(exchange, tokens, layout.order, speeds)
        self._squares = [(o, o + n) for o, n in zip(layout.offsets, layout.lengths, strict=True)]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool = True
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        return self._trade(q, k, v, scale, causal, self._attend)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool
    ) -> torch.Tensor:
        return tile_attention(q, k, v, [Tile(a, b, a, b, causal) for a, b in self._squares], scale)


class UlyssesRing:
    """The method for one pass: groups of `inner` neighbours share heads, the groups form a trimmed ring."""

    def __init__(self, exchange: Exchange, layout: Layout, groups: Layout, inner: int, speeds: Sequence[float]) -> None:
        """layout: planner.layout.grouped; groups: planner.layout.group_layout of the same shards."""
        group, place = divmod(exchange.member, inner)
        members = range(group * inner, (group + 1) * inner)
        # partners in the ring work on the same heads, so that heads go by place, not by rank
        by_place = [sum(speeds[p::inner]) for p in range(inner)]
        tokens = [layout.tokens(i) for i in members]
        self._trade = Trade(exchange.among(members), tokens, _places(layout, groups, group, members), by_place)
        partners = exchange.among(range(place, len(speeds), inner))
        self._ring = Ring(partners, groups, "trimmed_ring")

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool = True
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        return self._trade(q, k, v, scale, causal, self._ring)


def _places(layout: Layout, groups: Layout, group: int, members: range) -> list[int]:
    """Row in the group's block of every token of its members."""
    places: list[int] = []
    for segment in (s for i in members for s in layout.segments[i]):
        row = 0
        for s in groups.segments[group]:
            if s.sequence == segment.sequence and s.start <= segment.start < s.end:
                places.extend(range(row + segment.start - s.start, row + segment.end - s.start))
            row += len(s)
    return places
