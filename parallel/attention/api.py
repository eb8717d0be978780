"""`hm.attention`: what a model calls. Inside a pass it attends under the pass's layout, elsewhere plainly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.comm.exchange import Exchange
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.call_order import CallOrder
from heteromesh.parallel.attention.layout import Layout, layout_of
from heteromesh.parallel.attention.linear import LinearAttention, chunked
from heteromesh.parallel.attention.methods import split_method
from heteromesh.parallel.attention.scope import Scope, never_compiled
from heteromesh.parallel.attention.scoring import Attend, Scoring, default_scale
from heteromesh.parallel.attention.shape_check import Agreement
from heteromesh.parallel.attention.whole import Whole
from heteromesh.planner.model.mask import CAUSAL, Mask
from heteromesh.planner.plan import Pass
from heteromesh.planner.splitting.layout import contiguous


@dataclass(frozen=True)
class PassContext:
    """One pass as this rank sees it: its layout and how its attention runs."""

    layout: Layout
    member: int
    attend: Attend
    linear: LinearAttention | None = None
    """How its linear attention runs; needed only where the pass has several ranks."""
    order: CallOrder | None = None
    """Of calls, where the pass has several ranks."""
    exchange: Exchange | None = None
    """Among them."""

    @property
    def tokens(self) -> int:
        """Tokens that this rank holds."""
        return self.layout.tokens(self.member)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes `attention` this pass's within the block."""
        with ACTIVE_PASS.holding(self):
            yield


ACTIVE_PASS: Scope[PassContext] = Scope("heteromesh_pass")


def active_pass() -> PassContext | None:
    """Returns the pass that this thread is in, if any, also in a backward of it."""
    return ACTIVE_PASS.get()


def prepare_pass(plan: Pass, lengths: Sequence[int], world: World, speeds: Sequence[float]) -> PassContext:
    """Returns what this rank needs to run a pass. lengths[j]: of the pass's j-th sequence; speeds[r]: of world rank r.

    Raises UserError for a method that does not exist, ValueError for a rank that is not in the pass and for shards
    that do not hold every token of the sequences once.
    """
    layout = layout_of(plan, lengths)
    _check_shards(plan, lengths)
    if len(plan.ranks) == 1:
        return PassContext(layout, 0, Whole(layout))
    exchange = Exchange(world, plan.ranks)
    agreement = Agreement(exchange, layout, plan.method)
    attend = split_method(plan, layout, lengths, exchange, agreement, [speeds[r] for r in plan.ranks])
    linear = LinearAttention(layout, exchange.member, exchange, agreement)
    return PassContext(layout, exchange.member, attend, linear, CallOrder(exchange), exchange)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes attention, (B, H, S, D). k and v may have fewer heads (Hk divides H).

    Outside a pass every row of the batch is one sequence. Inside a pass B is 1 and S holds this rank's tokens of the
    pass's sequences, which never see each other. Raises ValueError on other shapes, and on every rank of the pass
    where one of them calls with other shapes than its peers.

    Args:
        q, k, v: queries, keys and values.
        scale: of the scores; 1/sqrt(D) unless given.
        causal: a query sees its own key and those before it; False: all of its sequence.
        window: of those only the last `window`, its own included.
        chunk: only keys in its own chunk; chunks of `chunk` tokens begin at each sequence's first.
        sinks: (H,) logits that join each head's softmax and have no value, so that weights sum to less than 1.
        softcap: scores become softcap * tanh(score / softcap).
    """
    return _attend(q, k, v, scale, causal, window, chunk, sinks, softcap)


@never_compiled
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    # no part of a compiled graph: each pass attends and exchanges in another way
    _check(q, k, v)
    mask = Mask(causal=causal, window=window, chunk=chunk)
    scoring = Scoring(scale=default_scale(scale, q.shape[-1]), mask=mask, softcap=softcap)
    _check_scoring(q, scoring, sinks)
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        wanted = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(wanted), k.to(wanted), v.to(wanted)
    context = ACTIVE_PASS.get()
    if context is not None:
        _check_tokens(context, q)
        return context.attend(q, k, v, scoring, sinks)
    if sinks is None and softcap is None and mask in (CAUSAL, Mask(causal=False)):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, scale=scale, enable_gqa=True)
    if not q.shape[0] * q.shape[2]:
        return torch.zeros_like(q)
    whole = Whole(contiguous((q.shape[2],), ((q.shape[2],),)))
    rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
    return torch.cat([whole(*row, scoring, sinks) for row in rows])


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, decay: Sequence[float] | None = None, causal: bool = True
) -> torch.Tensor:
    """Computes linear attention: o_t = sum over s <= t of decay^(t - s) (q_t . k_s) v_s (all s, where not causal).

    q and k (B, H, S, dk), v (B, H, S, dv); no scale and no feature map, they are the model's. decay: one constant per
    head in (0, 1]. Inside a pass as `attention`; what ranks exchange is one state (dk, dv) per head and segment,
    whatever the length. Raises ValueError on other shapes and decays.
    """
    return _attend_linearly(q, k, v, decay, causal)


@never_compiled
def _attend_linearly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: Sequence[float] | None, causal: bool
) -> torch.Tensor:
    fading = _check_linear(q, k, v, decay, causal)
    context = ACTIVE_PASS.get()
    if context is None:
        queries, keys, values = (x.to(accumulation_dtype(x.dtype)) for x in (q, k, v))
        out = chunked(queries, keys, values, fading) if causal else queries @ (keys.transpose(-1, -2) @ values)
        return out.to(q.dtype)
    _check_tokens(context, q)
    linear = context.linear
    if linear is None:
        if len(context.layout.segments) > 1:
            raise ValueError("this pass is not prepared for linear attention: make it with prepare_pass")
        linear = LinearAttention(context.layout, context.member, None, None)
    return linear(q, k, v, fading, causal)


def _check_linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: Sequence[float] | None, causal: bool
) -> tuple[float, ...] | None:
    if q.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            "linear attention takes q, k (B, H, S, dk) and v (B, H, S, dv), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (q.shape[1] and q.shape[3] and v.shape[3]):
        raise ValueError(
            f"linear attention needs at least one head and dimension, got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    if decay is None:
        return None
    fading = tuple(map(float, decay))
    if len(fading) != q.shape[1] or not all(0.0 < d <= 1.0 for d in fading):
        raise ValueError(f"decay needs one number in (0, 1] for each of {q.shape[1]} heads, got {fading}")
    if not causal:
        raise ValueError("decay is for causal linear attention: leave it out, or set causal")
    return fading


def _check_tokens(context: PassContext, q: torch.Tensor) -> None:
    if context.order is not None:
        context.order.note()
    if q.shape[0] != 1 or q.shape[2] != context.tokens:
        raise ValueError(
            f"inside a pass attention takes (1, heads, {context.tokens}, dim) for this rank's tokens, "
            f"got {tuple(q.shape)}"
        )


def _check_shards(plan: Pass, lengths: Sequence[int]) -> None:
    if len(plan.shards) != len(plan.ranks) or any(len(row) != len(lengths) for row in plan.shards):
        raise ValueError(
            f"a pass of {len(plan.ranks)} ranks and {len(lengths)} sequences needs as many rows and columns of shards"
        )
    for j, length in enumerate(lengths):
        held = [row[j] for row in plan.shards]
        if sum(held) != length or min(held) < 0:
            raise ValueError(f"shards {held} of sequence {j} don't add up to its {length} tokens")


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0]:
        raise ValueError(
            "attention takes q (B, H, S, D) and k, v (B, Hk, S, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if len({q.device, k.device, v.device}) > 1:
        raise ValueError(f"attention needs q, k and v on one device, got {q.device}, {k.device} and {v.device}")
    if not (q.shape[1] and k.shape[1] and q.shape[3]):
        raise ValueError(f"attention needs at least one head and dimension, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention needs as many queries as keys and query heads in multiples of key heads, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )


def _check_scoring(q: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None) -> None:
    softcap = scoring.softcap
    if softcap is not None and not softcap > 0:
        raise UserError(f"attention with softcap={softcap}: it must be above 0, or None for scores that are not capped")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        raise UserError(
            f"attention with sinks {tuple(sinks.shape)} on {sinks.device} and {q.shape[1]} heads on {q.device}: "
            "give one logit a query head, on the device of q"
        )
