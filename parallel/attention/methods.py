"""The ways to split attention over the ranks of a pass, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.attention.gather import Gather
from heteromesh.parallel.attention.ring import Ring
from heteromesh.parallel.attention.scoring import Attend, Scoring
from heteromesh.parallel.attention.shape_check import DTYPES, Agreement
from heteromesh.parallel.attention.token_ring import TokenRing
from heteromesh.parallel.attention.ulysses import Ulysses
from heteromesh.parallel.attention.ulysses_ring import UlyssesRing
from heteromesh.planner.plan import Pass
from heteromesh.planner.splitting.layout import Layout, base_name, group_layout, inner_degree
from heteromesh.planner.splitting.routes import RINGS


class Split:
    """A method with the checks that come before its first exchange."""

    def __init__(self, exchange: Exchange, agreement: Agreement, method: str, head_ranks: int, attend: Attend) -> None:
        """head_ranks: over how many ranks the method deals heads."""
        self._exchange, self._agreement, self._method = exchange, agreement, method
        self._head_ranks, self._attend = head_ranks, attend

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        check_tensors(self._exchange, q, k, v)
        if q.shape[1] < self._head_ranks:
            raise ValueError(
                f"method {self._method} deals heads to {self._head_ranks} ranks and attention has {q.shape[1]}: "
                f"use at most {q.shape[1]} ranks, or the method gather or trimmed_ring"
            )
        kind = f"attention {scoring.softcap} {sinks is not None}"
        self._agreement.check(kind, q, k, v, scoring.mask)
        return self._attend(q, k, v, scoring, sinks)


def check_tensors(exchange: Exchange, *tensors: torch.Tensor) -> None:
    """Raises ValueError unless all are of one dtype that attention takes and on the world's device."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or dtypes.isdisjoint(DTYPES):
        raise ValueError(
            f"attention over ranks takes q, k and v of one dtype among {', '.join(map(_name, DTYPES))}, "
            f"got {', '.join(_name(t.dtype) for t in tensors)}"
        )
    for t in tensors:
        if t.device.type != exchange.device.type:
            raise ValueError(
                f"attention over ranks takes tensors on the world's device {exchange.device}, got {t.device}"
            )


def split_method(
    plan: Pass,
    layout: Layout,
    lengths: Sequence[int],
    exchange: Exchange,
    agreement: Agreement,
    speeds: Sequence[float],
) -> Attend:
    """Returns the attention of a pass of several ranks. speeds[i]: of the pass's i-th rank."""
    name, size = base_name(plan.method), len(plan.ranks)
    attend: Attend
    head_ranks = 1
    if name == "gather":
        attend = Gather(exchange, layout)
    elif name == "ulysses":
        attend, head_ranks = Ulysses(exchange, layout, speeds), size
    elif name == "ulysses_ring":
        head_ranks = inner_degree(plan.method, size)
        attend = UlyssesRing(exchange, layout, group_layout(lengths, plan.shards, head_ranks), head_ranks, speeds)
    elif name == "token_ring":
        attend = TokenRing(exchange, layout, "token_ring")
    else:
        kinds = [kind for kind in RINGS if kind == name]
        if not kinds:
            raise ValueError(f"method {plan.method!r} is for one rank, and the pass names {size}")
        attend = Ring(exchange, layout, kinds[0])
    return Split(exchange, agreement, plan.method, head_ranks, attend)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
