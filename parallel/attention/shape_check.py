"""Before ranks exchange tensors of a new shape they tell each other what they are about to do.

A rank whose shapes differ from its peers' would otherwise hang them, or fill their buffers with something else. One
message of 64 bytes to each peer, once per pass and shape. A rank that makes fewer calls than the others is found when
its forward ends (call_order.py).
"""

from __future__ import annotations

import zlib

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.splitting.layout import Layout
from heteromesh.planner.splitting.traffic import AGREEMENT_BYTES

LONGEST = (1 << 31) - 1
"""Of windows and chunks that are told apart."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Agreement:
    """What the members of a pass have agreed on."""

    def __init__(self, exchange: Exchange, layout: Layout, method: str) -> None:
        self._exchange, self._agreed = exchange, set[tuple[int, ...]]()
        self._plan = zlib.crc32(repr((method, layout)).encode())

    def check(self, kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> None:
        """Returns when every member has made the same call; q (1, H, n, D), k (1, Hk, n, D), v (1, Hk, n, Dv).

        Raises ValueError on every member where one differs in heads, dimensions, dtype, mask, `kind` of call or
        plan. A shape that was agreed on before costs nothing.
        """
        mine = (
            zlib.crc32(kind.encode(), self._plan),
            q.shape[1],
            k.shape[1],
            q.shape[3],
            v.shape[3],
            DTYPES.index(q.dtype),
            _number(mask),
            int(torch.is_grad_enabled()),
        )
        if mine in self._agreed:
            return
        own = torch.tensor(mine, dtype=torch.int64, device=self._exchange.device)
        assert own.nbytes == AGREEMENT_BYTES
        everyone = [torch.zeros_like(own) for _ in self._exchange.ranks]
        self._exchange.all_to_all([own] * len(everyone), everyone, "agree on shapes")
        told = [tuple(t.tolist()) for t in everyone]
        for rank, other in zip(self._exchange.ranks, told, strict=True):
            if other != told[0]:
                raise ValueError(
                    f"ranks of a pass must call attention alike: rank {self._exchange.ranks[0]} called "
                    f"{_words(told[0])} and rank {rank} {_words(other)}"
                )
        self._agreed.add(mine)


def _number(mask: Mask) -> int:
    """Returns the mask as one number: a bit for causal, 31 for a window and 31 for chunks, 0 for none."""
    window, chunk = (min(n or 0, LONGEST) for n in (mask.window, mask.chunk))
    return int(mask.causal) | window << 1 | chunk << 32


def _mask_words(number: int) -> str:
    window, chunk = number >> 1 & LONGEST, number >> 32
    limits = (f", {name} {size}" for name, size in (("window", window), ("chunk", chunk)) if size)
    return ("causal" if number & 1 else "full") + "".join(limits)


def _words(fields: tuple[int, ...]) -> str:
    plan, heads, kv_heads, dim, value_dim, dtype, mask, grad = fields
    name = str(DTYPES[dtype]).removeprefix("torch.")
    dims = f"dim {dim}" + f" and {value_dim}" * (value_dim != dim)
    return (
        f"({heads} heads, {kv_heads} key heads, {dims}, {name}, {_mask_words(mask)}, "
        f"gradients {'on' if grad else 'off'}, plan and function {plan:x})"
    )
