"""Linear attention over ranks: o_t = sum over s <= t of decay^(t - s) (q_t . k_s) v_s, sequence by sequence.

LASP-2 (arXiv 2502.07563): every rank turns its keys and values into one state (dk, dv) per head and segment, one
exchange brings the states of earlier segments, and what it moves does not grow with the length. Here also for packed
sequences (no state passes from one to the next), segments of any length and number per rank (zigzag), and a constant
decay per head (RetNet, arXiv 2307.08621). The backward makes the same exchange the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.attention.methods import check_tensors
from heteromesh.parallel.attention.shape_check import Agreement
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.splitting.layout import Layout, Segment
from heteromesh.planner.splitting.states import StateRoute, state_routes

CHUNK = 64
Decay = tuple[float, ...] | None


def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: Decay) -> torch.Tensor:
    """Computes causal linear attention of whole sequences, (..., H, n, d); differentiable by autograd, linear in n."""
    n, rates = q.shape[-2], _log(decay, q)
    front = -n % CHUNK  # in front, so that chunks end where the sequence ends
    q, k, v = (functional.pad(x, (0, 0, front, 0)).unflatten(-2, (-1, CHUNK)) for x in (q, k, v))
    place = torch.arange(CHUNK, device=q.device, dtype=q.dtype)
    age = place.unsqueeze(1) - place
    within = (rates * age.clamp_min(0)).exp().tril()
    out = (q @ k.transpose(-1, -2) * within.unsqueeze(-3)) @ v
    if q.shape[-3] > 1:
        states = _fade(k, rates.unsqueeze(-1), CHUNK - 1 - place).transpose(-1, -2) @ v
        out = out + _fade(q, rates.unsqueeze(-1), place + 1) @ _before(states, (rates * CHUNK).exp())
    return out.flatten(-3, -2)[..., front:, :]


def _before(states: torch.Tensor, fade: torch.Tensor) -> torch.Tensor:
    """Turns states (..., chunks, dk, dv) of single chunks into, for each chunk, the state of all before it."""
    running = torch.zeros_like(states[..., 0, :, :])
    found = []
    for state in states.unbind(-3):
        found.append(running)
        running = running * fade + state
    return torch.stack(found, -3)


def _log(decay: Decay, like: torch.Tensor) -> torch.Tensor:
    """Returns (H, 1, 1) logarithms of the decay."""
    values = decay or (1.0,) * like.shape[-3]
    return torch.tensor(values, dtype=torch.float64).log().to(like.device, like.dtype).view(-1, 1, 1)


def _fade(x: torch.Tensor, rates: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
    """Multiplies x (..., n, d) by decay^age, age (n,)."""
    return x * (rates * age.unsqueeze(-1)).exp()


class LinearAttention:
    """Linear attention of one pass, under any layout. `exchange` is None where the pass has one rank."""

    def __init__(self, layout: Layout, member: int, exchange: Exchange | None, agreement: Agreement | None) -> None:
        self.exchange, self._agreement = exchange, agreement
        self._layout, self._member = layout, member
        self.own = layout.segments[member]
        self._routes: dict[bool, StateRoute] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: Decay, causal: bool) -> torch.Tensor:
        """q and k (1, H, n, dk), v (1, H, n, dv), n this rank's tokens; returns (1, H, n, dv)."""
        if self.exchange is not None and self._agreement is not None:
            check_tensors(self.exchange, q, k, v)
            self._agreement.check(f"linear attention {decay}", q, k, v, Mask(causal=causal))
        result: torch.Tensor = _LinearAttention.apply(q, k, v, self, decay, causal)  # type: ignore[no-untyped-call]
        return result

    def route(self, causal: bool) -> StateRoute:
        """Returns whose states this member's segments need, and the other way round."""
        if causal not in self._routes:
            self._routes[causal] = state_routes(self._layout, causal=causal)[self._member]
        return self._routes[causal]


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        method: LinearAttention,
        decay: Decay,
        causal: bool,
    ) -> torch.Tensor:
        local, route = _Local(q, k, v, method.own, decay, causal), method.route(causal)
        states = {s: local.state(i) for i, s in enumerate(method.own) if s in route.shared}
        transfer = _Trade(method.exchange, states, route.sends, route.receives, local.empty, "states")
        with torch.no_grad():
            outputs = [local.attend(*local.operands(i)) for i in range(len(method.own))]
        states |= transfer.finish()
        before = [local.gather(s, route.needs[s], states) for s in method.own]
        for i, state in enumerate(before):
            if state is not None:
                outputs[i] += local.aged_queries(i) @ state
        ctx.save_for_backward(q, k, v, *(x for x in before if x is not None))
        ctx.method, ctx.decay, ctx.causal, ctx.has_state = method, decay, causal, [x is not None for x in before]
        return torch.cat([v.new_empty(v.shape[1], 0, v.shape[3]), *outputs], 1).to(q.dtype).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *saved = ctx.saved_tensors
        method, route = ctx.method, ctx.method.route(ctx.causal)
        local = _Local(q, k, v, method.own, ctx.decay, ctx.causal)
        parts = local.split(grads[0])
        before: list[torch.Tensor | None] = [saved.pop(0) if has else None for has in ctx.has_state]
        found = {
            s: local.aged_queries(i).transpose(-1, -2) @ parts[i] for i, s in enumerate(method.own) if route.needs[s]
        }
        transfer = _Trade(
            method.exchange, found, route.gradient_sends, route.gradient_receives, local.empty, "states backward"
        )
        gradients = [local.intra_gradient(i, parts[i]) for i in range(len(method.own))]
        found |= transfer.finish()
        for i, s in enumerate(method.own):
            dq, dk, dv = gradients[i]
            if (state := before[i]) is not None:
                dq += local.aged(parts[i] @ state.transpose(-1, -2), i, from_start=True)
            after = local.gather_back(s, route.feeds[s], found)
            if after is not None:
                _, keys, values = local.operands(i)
                dk += local.aged(values @ after.transpose(-1, -2), i, from_start=False)
                dv += local.aged(keys, i, from_start=False) @ after
        joined = (
            torch.cat([x.new_empty(x.shape[1], 0, x.shape[3]), *(g[j] for g in gradients)], 1)
            for j, x in enumerate((q, k, v))
        )
        return *(g.to(q.dtype).unsqueeze(0) for g in joined), None, None, None


class _Local:
    """This rank's segments in a wide dtype, (H, n, d) each, and what can be done with them alone."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: Sequence[Segment], decay: Decay, causal: bool
    ) -> None:
        self._own, self._decay, self._causal = own, decay, causal
        self._parts = [self.split(x) for x in (q, k, v)]
        self.empty = torch.empty(
            q.shape[1], q.shape[3], v.shape[3], dtype=accumulation_dtype(q.dtype), device=q.device
        )  # of one state
        self._rates = _log(decay, self.empty)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Returns (1, H, n, d) cut into segments."""
        return list(x[0].to(accumulation_dtype(x.dtype)).split([len(s) for s in self._own], 1)) if self._own else []

    def operands(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns q, k, v of a segment."""
        q, k, v = (parts[i] for parts in self._parts)
        return q, k, v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attends from a segment's queries to its own keys."""
        return chunked(q, k, v, self._decay) if self._causal else q @ (k.transpose(-1, -2) @ v)

    def intra_gradient(self, i: int, grad: torch.Tensor) -> list[torch.Tensor]:
        """Returns dq, dk, dv of `attend`."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in self.operands(i)]
            out = self.attend(leaves[0], leaves[1], leaves[2])
        return list(torch.autograd.grad(out, leaves, grad))

    def aged(self, x: torch.Tensor, i: int, *, from_start: bool) -> torch.Tensor:
        """Fades x (H, n, d) by the distance to the tokens before the segment, or to the segment's last token."""
        n = len(self._own[i])
        place = torch.arange(n, device=x.device, dtype=x.dtype)
        return _fade(x, self._rates, place + 1 if from_start else n - 1 - place)

    def aged_queries(self, i: int) -> torch.Tensor:
        """Queries as they see a state of earlier tokens."""
        return self.aged(self._parts[0][i], i, from_start=True)

    def state(self, i: int) -> torch.Tensor:
        """Returns what later tokens need to know of a segment, (H, dk, dv)."""
        return self.aged(self._parts[1][i], i, from_start=False).transpose(-1, -2) @ self._parts[2][i]

    def gather(self, s: Segment, others: Sequence[Segment], states: dict[Segment, torch.Tensor]) -> torch.Tensor | None:
        """Returns the states of `others` as the segment's first token sees them; None where there are none."""
        return self._sum([(states[o], s.start - o.end) for o in others])

    def gather_back(
        self, s: Segment, others: Sequence[Segment], found: dict[Segment, torch.Tensor]
    ) -> torch.Tensor | None:
        """Returns the gradient of the segment's state from the `others` that use it."""
        return self._sum([(found[o], o.start - s.end) for o in others])

    def _sum(self, parts: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor | None:
        total = None
        for state, distance in parts:
            faded = state * (self._rates * max(0, distance)).exp()
            total = faded if total is None else total + faded
        return total


Route = dict[int, tuple[Segment, ...]]


class _Trade:
    """One message to and from each peer, with the states that it needs."""

    def __init__(
        self,
        exchange: Exchange | None,
        states: dict[Segment, torch.Tensor],
        sends: Route,
        receives: Route,
        like: torch.Tensor,
        name: str,
    ) -> None:
        self._receives = receives
        self._buffers = {i: like.new_empty(len(s), *like.shape) for i, s in receives.items()}
        outgoing = [(i, torch.stack([states[s] for s in segments])) for i, segments in sends.items()]
        self._transfer = (
            exchange.start(outgoing, list(self._buffers.items()), name) if exchange and (sends or receives) else None
        )

    def finish(self) -> dict[Segment, torch.Tensor]:
        """Adds the states of other ranks."""
        if self._transfer:
            self._transfer.wait()
        return {s: self._buffers[i][n] for i, segments in self._receives.items() for n, s in enumerate(segments)}
