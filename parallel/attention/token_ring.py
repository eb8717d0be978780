"""TokenRing: keys and values stay, queries travel, and partial outputs go straight back to their owner.

arXiv 2412.20501, with the exact training backward that it lacks: queries, output gradients, logsumexp and
delta = rowsum(grad * out) travel like the queries, partial query gradients go home, key and value gradients never
move. A flash backward wants `out` only to form delta, so it gets grad * delta / |grad|^2 in its place, which has the
same delta: a third less to send.
"""

from __future__ import annotations

from typing import Any

import torch

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.parallel.attention.kernels.block import merge_into
from heteromesh.parallel.attention.kernels.sinks import add_sinks, sinks_gradient
from heteromesh.parallel.attention.kernels.tiled import backward_tile, forward_tiles, heads_first
from heteromesh.parallel.attention.kernels.tiled import rows_first as rows
from heteromesh.parallel.attention.layout import rows_of
from heteromesh.parallel.attention.ring import Ring, Side, add_rows
from heteromesh.parallel.attention.ring_exchange import Block, Tensors
from heteromesh.parallel.attention.scoring import Scoring
from heteromesh.planner.splitting.layout import Segment


class TokenRing(Ring):
    """The method for one pass."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        side = self.side(scoring.mask)
        result: torch.Tensor = _TokenRingAttention.apply(q, k, v, side, scoring, sinks)  # type: ignore[no-untyped-call]
        return result


class _TokenRingAttention(torch.autograd.Function):
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
        q, k, v = rows(q), rows(k), rows(v)
        wide = accumulation_dtype(q.dtype)
        out = torch.empty(q.shape, dtype=wide, device=q.device)
        lse = out.new_empty(q.shape[:2])

        def visit(block: Block) -> Tensors:
            part, part_lse = forward_tiles(block.tensors[0], k, v, ring.tiles(block), scoring)
            if ring.is_own(block):
                out.copy_(part)
                lse.copy_(part_lse)
            return [part, part_lse]

        def deliver(segments: tuple[Segment, ...], parts: Tensors) -> None:
            row = 0
            for a, b in rows_of(ring.own, segments):
                merge_into(out[a:b], lse[a:b], parts[0][row : row + b - a], parts[1][row : row + b - a])
                row += b - a

        if len(q):
            ring.circulation.run([q], visit, "token ring", [q, lse], deliver)
        add_sinks(out, lse, sinks)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse, sinks)
        ctx.ring, ctx.scoring = ring, scoring
        return heads_first(result)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        ring, grad, wide = ctx.ring, rows(grads[0]), lse.dtype
        delta = (grad.to(wide) * out.to(wide)).sum(-1)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, k, v))

        def visit(block: Block) -> Tensors:
            queries, gradients = block.tensors[0].chunk(2, 1)
            statistics, deltas = block.tensors[1].chunk(2, 1)
            outputs = out if ring.is_own(block) else stand_in(gradients, deltas)
            total = torch.zeros(queries.shape, dtype=wide, device=q.device)
            for t in ring.tiles(block):
                parts = backward_tile(gradients, queries, k, v, outputs, statistics, t, ctx.scoring)
                total[t.q0 : t.q1] += parts[0]
                dk[t.k0 : t.k1] += parts[1]
                dv[t.k0 : t.k1] += parts[2]
            if ring.is_own(block):
                dq.add_(total)
            return [total.to(q.dtype)]

        def deliver(segments: tuple[Segment, ...], parts: Tensors) -> None:
            add_rows(dq, ring.own, segments, parts[0])

        if len(q):
            bundle = [torch.cat([q, grad], 1), torch.cat([lse, delta], 1)]
            ring.circulation.run(bundle, visit, "token ring backward", [q], deliver)
        dsinks = sinks_gradient(grad, out, lse, sinks)
        return *(heads_first(x.to(q.dtype)) for x in (dq, dk, dv)), None, None, dsinks


def stand_in(grad: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Makes an output (n, H, D) whose product with `grad` sums to `delta` (n, H) in every row; 0 where `grad` is 0."""
    wide = grad.to(delta.dtype)
    square = (wide * wide).sum(-1).clamp_min_(torch.finfo(delta.dtype).tiny)
    return (wide * (delta / square).unsqueeze(-1)).to(grad.dtype)
