"""Ulysses: tokens are traded for heads, each rank attends over whole sequences with some heads, and back.

DeepSpeed-Ulysses (arXiv 2309.14509) for uneven shards, uneven heads and grouped queries: a key head whose query heads
lie on several ranks is sent to each of them, and its gradient is their sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.attention.kernels.tiled import heads_first
from heteromesh.parallel.attention.scoring import Attend, Scoring
from heteromesh.parallel.attention.whole import Whole
from heteromesh.planner.splitting.heads import HeadShare, head_shares
from heteromesh.planner.splitting.layout import Layout


class _Route:
    """Who holds which tokens and which heads; everything is rows first, so that a member's tokens are one piece."""

    def __init__(self, exchange: Exchange, tokens: Sequence[int], order: Sequence[int]) -> None:
        """tokens[i]: of member i. order: where attention wants each token, the tokens listed member by member."""
        self.exchange = exchange
        edges = list(itertools.accumulate(tokens, initial=0))
        self.rows = [slice(a, b) for a, b in itertools.pairwise(edges)]
        self.own_tokens = tokens[exchange.member]
        self._sorted = list(order) == list(range(len(order)))
        self._to_members = torch.tensor(order, device=exchange.device, dtype=torch.long)
        self._to_sequences = torch.empty_like(self._to_members)
        self._to_sequences[self._to_members] = torch.arange(len(order), device=exchange.device)

    def in_order(self, x: torch.Tensor) -> torch.Tensor:
        """Rows member by member, as attention wants them."""
        return x if self._sorted else x.index_select(0, self._to_sequences)

    def by_member(self, x: torch.Tensor) -> torch.Tensor:
        """Reverses `in_order`."""
        return x if self._sorted else x.index_select(0, self._to_members)

    def peers(self) -> list[int]:
        """Returns the other members, the next one first."""
        size, me = len(self.rows), self.exchange.member
        return [(me + i) % size for i in range(1, size)]

    def to_heads(self, pieces: Callable[[int], list[torch.Tensor]], width: int, name: str) -> torch.Tensor:
        """Returns (all tokens, width, D) of own heads, member by member; pieces(i): own tokens of member i's heads."""
        me, peers = self.exchange.member, self.peers()
        first = pieces(me)
        whole = first[0].new_empty(self.rows[-1].stop, width, first[0].shape[2])
        sends = [(i, torch.cat(pieces(i), 1)) for i in peers]
        transfer = self.exchange.start(sends, [(i, whole[self.rows[i]]) for i in reversed(peers)], name)
        torch.cat(first, 1, out=whole[self.rows[me]])
        transfer.wait()
        return whole

    def to_tokens(
        self, pieces: Callable[[slice], torch.Tensor], widths: Sequence[int], name: str
    ) -> list[torch.Tensor]:
        """Returns by member (own tokens, widths[i], D), its heads. pieces(rows): this member's heads of some rows."""
        me, peers = self.exchange.member, self.peers()
        own = pieces(self.rows[me])
        parts = [own if i == me else own.new_empty(self.own_tokens, w, own.shape[2]) for i, w in enumerate(widths)]
        sends = [(i, pieces(self.rows[i]).contiguous()) for i in peers]
        self.exchange.start(sends, [(i, parts[i]) for i in reversed(peers)], name).wait()
        return parts


class _ToHeads(torch.autograd.Function):
    """q, k, v (own tokens, heads, D) to (all tokens, own heads, D); key heads go to every rank that uses them."""

    @staticmethod
    def forward(
        ctx: Any, route: _Route, shares: Sequence[HeadShare], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.route, ctx.shares, ctx.kv_heads = route, shares, k.shape[1]
        mine = shares[route.exchange.member]

        def pieces(i: int) -> list[torch.Tensor]:
            s = shares[i]
            return [q[:, s.first : s.last], k[:, s.first_key : s.last_key], v[:, s.first_key : s.last_key]]

        whole = route.in_order(route.to_heads(pieces, _width(mine), "ulysses q, k, v"))
        q, k, v = whole.split([mine.queries, mine.keys, mine.keys], 1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        route, shares = ctx.route, ctx.shares
        whole = [route.by_member(g) for g in grads]
        widths = [_width(s) for s in shares]
        parts = route.to_tokens(lambda rows: torch.cat([g[rows] for g in whole], 1), widths, "ulysses q, k, v backward")
        cuts = [p.split([s.queries, s.keys, s.keys], 1) for p, s in zip(parts, shares, strict=True)]
        dk, dv = (_joined_keys([c[j] for c in cuts], shares, ctx.kv_heads) for j in (1, 2))
        return None, None, torch.cat([c[0] for c in cuts], 1), dk, dv


class _ToTokens(torch.autograd.Function):
    """(all tokens, own heads, D) to (own tokens, all heads, D)."""

    @staticmethod
    def forward(ctx: Any, route: _Route, shares: Sequence[HeadShare], out: torch.Tensor) -> torch.Tensor:
        ctx.route, ctx.shares = route, shares
        whole = route.by_member(out)
        parts = route.to_tokens(lambda rows: whole[rows], [s.queries for s in shares], "ulysses out")
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        route, shares = ctx.route, ctx.shares

        def pieces(i: int) -> list[torch.Tensor]:
            return [grads[0][:, shares[i].first : shares[i].last]]

        mine = shares[route.exchange.member]
        return None, None, route.in_order(route.to_heads(pieces, mine.queries, "ulysses out backward"))


def _width(share: HeadShare) -> int:
    return share.queries + 2 * share.keys


def _joined_keys(parts: Sequence[torch.Tensor], shares: Sequence[HeadShare], kv_heads: int) -> torch.Tensor:
    """Returns the gradients of all key heads; one that several ranks had is summed in rank order."""
    if sum(s.keys for s in shares) == kv_heads:
        return torch.cat(list(parts), 1)
    total = parts[0].new_zeros(len(parts[0]), kv_heads, parts[0].shape[2], dtype=accumulation_dtype(parts[0].dtype))
    for part, share in zip(parts, shares, strict=True):
        total[:, share.first_key : share.last_key] += part
    return total.to(parts[0].dtype)


class Trade:
    """Tokens for heads and back, around an attention that sees all tokens of the exchange's members."""

    def __init__(
        self, exchange: Exchange, tokens: Sequence[int], order: Sequence[int], speeds: Sequence[float]
    ) -> None:
        """tokens[i]: of member i. order: where `attend` wants each token, the tokens listed member by member."""
        self._route, self._speeds, self._member = _Route(exchange, tokens, order), tuple(speeds), exchange.member

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scoring: Scoring,
        sinks: torch.Tensor | None,
        attend: Attend,
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        group, shares = q.shape[1] // k.shape[1], head_shares(q.shape[1], k.shape[1], self._speeds)
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        queries, keys, values = _ToHeads.apply(self._route, shares, *rows)  # type: ignore[no-untyped-call]
        mine = shares[self._member]
        if not mine.aligned:
            owner = torch.arange(mine.first, mine.last, device=q.device) // group - mine.first_key
            keys, values = keys[:, owner], values[:, owner]
        own_sinks = None if sinks is None else sinks[mine.first : mine.last]
        out = attend(heads_first(queries), heads_first(keys), heads_first(values), scoring, own_sinks)
        back: torch.Tensor = _ToTokens.apply(self._route, shares, out[0].transpose(0, 1))  # type: ignore[no-untyped-call]
        return heads_first(back)


class Ulysses:
    """The method for one pass. speeds[i]: of member i."""

    def __init__(self, exchange: Exchange, layout: Layout, speeds: Sequence[float]) -> None:
        tokens = [layout.tokens(i) for i in range(len(layout.segments))]
        self._trade = Trade(exchange, tokens, layout.order, speeds)
        self._whole = Whole(layout)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        return self._trade(q, k, v, scoring, sinks, self._whole)
