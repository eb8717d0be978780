"""Gather: every rank collects the keys and values that its queries see, all at once.

Context parallelism of Llama 3 (arXiv 2407.21783, section 3.3.2), with zigzag shards of any size and without the keys
that nobody on a rank sees. The rank's own keys are worked on while the others arrive, and in the backward while the
gradients of the others' keys go home, where they are summed in member order.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    rows_first,
)
from heteromesh.parallel.attention.kernels.tiles import Tile, tiles_between
from heteromesh.parallel.attention.layout import pick, rows_of
from heteromesh.parallel.attention.ring import add_rows
from heteromesh.parallel.attention.scoring import Scoring
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.splitting.layout import Layout, Segment
from heteromesh.planner.splitting.masked import masked
from heteromesh.planner.splitting.routes import schedule


class Gather:
    """The method for one pass."""

    def __init__(self, exchange: Exchange, layout: Layout) -> None:
        self.exchange, self._layout = exchange, layout
        self._sides: dict[Mask, _Side] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        mask = scoring.mask
        if mask not in self._sides:
            self._sides[mask] = _Side(self._layout, self.exchange.member, mask)
        side = self._sides[mask]
        result: torch.Tensor = _GatherAttention.apply(q, k, v, self.exchange, side, scoring, sinks)  # type: ignore[no-untyped-call]
        return result


class _Side:
    """Who needs what of whom, and the tiles, for one mask."""

    def __init__(self, layout: Layout, member: int, mask: Mask) -> None:
        messages = [m for r in schedule(layout, "direct", mask).of(member).rounds for m in r]
        layout, mask = masked(layout, mask)
        self.own = own = layout.segments[member]
        self.sends = {m.target: m.segments for m in messages if m.source == member}
        self.receives = {m.source: m.segments for m in messages if m.target == member}
        self.remote = sorted((s for part in self.receives.values() for s in part), key=lambda s: (s.sequence, s.start))
        self.own_tiles = tiles_between(own, own, causal=mask.causal, window=mask.window)
        self.remote_tiles = tiles_between(own, self.remote, causal=mask.causal, window=mask.window)

    def sort(self, parts: dict[int, torch.Tensor]) -> torch.Tensor:
        """Returns what the members sent, in the order of `remote`."""
        pieces: dict[Segment, torch.Tensor] = {}
        for member, segments in self.receives.items():
            pieces.update(zip(segments, parts[member].split([len(s) for s in segments]), strict=True))
        return torch.cat([pieces[s] for s in self.remote])

    def unsort(self, block: torch.Tensor) -> dict[int, torch.Tensor]:
        """Reverses `sort`."""
        return {i: pick(block, rows_of(self.remote, s)).contiguous() for i, s in self.receives.items()}


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        exchange: Exchange,
        side: _Side,
        scoring: Scoring,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        q, kv = rows_first(q), torch.cat([rows_first(k), rows_first(v)], 1)
        parts = {i: kv.new_empty(sum(map(len, s)), *kv.shape[1:]) for i, s in side.receives.items()}
        sends = [(i, pick(kv, rows_of(side.own, s))) for i, s in side.sends.items()]
        transfer = exchange.start(sends, list(parts.items()), "gather k, v")
        keys, values = kv.chunk(2, 1)
        out, lse = forward_tiles(q, keys, values, side.own_tiles, scoring)
        transfer.wait()
        remote = side.sort(parts) if parts else kv[:0]
        if parts:
            wide = out.to(accumulation_dtype(out.dtype))
            keys, values = remote.chunk(2, 1)
            for t in side.remote_tiles:
                merge_into(wide[t.q0 : t.q1], lse[t.q0 : t.q1], *forward_tile(q, keys, values, t, scoring))
            add_sinks(wide, lse, sinks)
            out = wide.to(out.dtype)
        else:
            add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, kv, remote, out, lse, sinks)
        ctx.exchange, ctx.side, ctx.scoring = exchange, side, scoring
        return heads_first(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, kv, remote, out, lse, sinks = ctx.saved_tensors
        side, grad = ctx.side, rows_first(grads[0])
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)

        def gradient(block: torch.Tensor, tiles: Sequence[Tile]) -> RowSum:
            keys, values = block.chunk(2, 1)
            total = RowSum(block, [(t.k0, t.k1) for t in tiles])
            for t in tiles:
                part, *parts = backward_tile(grad, q, keys, values, out, lse, t, ctx.scoring)
                dq[t.q0 : t.q1] += part
                total.add((t.k0, t.k1), *parts)
            return total

        home = side.unsort(gradient(remote, side.remote_tiles).result())
        parts = {i: kv.new_empty(sum(map(len, s)), *kv.shape[1:]) for i, s in side.sends.items()}
        transfer = ctx.exchange.start(list(home.items()), list(parts.items()), "gather k, v backward")
        dkv = gradient(kv, side.own_tiles).total.to(lse.dtype)
        transfer.wait()
        for member in sorted(parts):
            add_rows(dkv, side.own, side.sends[member], parts[member])
        dk, dv = dkv.to(kv.dtype).chunk(2, 1)
        dsinks = sinks_gradient(grad, out, lse, sinks)
        return heads_first(dq.to(q.dtype)), heads_first(dk), heads_first(dv), None, None, None, dsinks
