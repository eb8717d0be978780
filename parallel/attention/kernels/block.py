"""Attention of one block of queries over one block of keys, and the exact merge of blocks by logsumexp.

Forward: out = sum_i exp(lse_i - lse) out_i with lse = logsumexp_i(lse_i) over the blocks i of a query row. Backward:
a block's flash backward, called with the merged out and lse, gives exact dK, dV of the block and its share of dQ.
On the CPU torch's flash kernel; on CUDA torch's flash kernel for 16-bit values where it passes a check (flash.py);
else, and where scores are capped, the formula, a few rows at a time: its memory is bounded.
Shapes: q (B, H, Sq, D), k and v (B, Hk, Sk, D) with H a multiple of Hk; lse (B, H, Sq) in float32 (or float64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial

import torch

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.parallel.attention.kernels.flash import DTYPES, FLASH, Kernel, Kind, checked

aten = torch.ops.aten
SCORES = 1 << 23
"""Scores that the formula has in memory at a time, or those of one row where these are more."""


def forward_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, lse) of one block. softcap: scores become softcap * tanh(score / softcap).

    The last dimension must be dense and neither side empty (torch's CPU kernel is silently wrong on the one and kills
    the process on the other); causal blocks must be square (kernels differ in how they align others).
    """
    _guard(q, k, v, causal)
    return _kernel(q, k, causal, softcap).forward(q, k, v, causal, scale)


def backward_block(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) of one block, given the out and lse of the whole rows. Limits as in `forward_block`."""
    _guard(q, k, v, causal)
    return _kernel(q, k, causal, softcap).backward(grad, q, k, v, out, lse, causal, scale)


def merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merges the result of further keys into (out, lse), in place. out (..., D) and lse (...) are in wide dtypes.

    Both lse must be finite: no row may be without keys.
    """
    out.lerp_(part.to(out.dtype), (part_lse - lse).sigmoid_().unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


def _guard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "last dimension is not dense"
    assert q.shape[2] * k.shape[2], "empty block"
    assert not causal or q.shape[2] == k.shape[2], "causal block is not square"


def _kernel(q: torch.Tensor, k: torch.Tensor, causal: bool, softcap: float | None) -> Kernel:
    if softcap is not None:
        return _capped(softcap)
    if q.device.type == "cpu":
        return CPU_FLASH
    if q.device.type != "cuda" or q.dtype not in DTYPES or q.shape[-1] % 8:
        return FORMULA
    return _cuda_kernel(Kind(q.device, q.dtype, q.shape[-1], causal, q.shape[1] // k.shape[1]))


@cache
def _capped(softcap: float) -> Kernel:
    """Returns the formula with capped scores: no flash kernel of torch has them."""
    return Kernel(
        name="the formula with capped scores",
        forward=partial(_math_forward, softcap=softcap),
        backward=partial(_math_backward, softcap=softcap),
    )


@cache
def _cuda_kernel(kind: Kind) -> Kernel:
    """Checks the kernel once a process."""
    with torch.no_grad():
        return checked(FLASH, FORMULA, kind)


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.contiguous() for x in (q, k, v))  # the kernel is up to a tenth slower on strided rows
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _cpu_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, q, k, v, out = (x.contiguous() for x in (grad, q, k, v, out))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, dk, dv


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Returns (B, Hk, G, Sq, Sk) scores of all keys, G query heads per key head, at least float32."""
    wide = accumulation_dtype(q.dtype)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, k.to(wide)) * scale
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hide_later(scores: torch.Tensor, first: int, causal: bool) -> torch.Tensor:
    """Returns the scores with -inf at keys after the query; first: the first query's place among the keys."""
    if not causal:
        return scores
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + first)
    return scores.masked_fill(mask, -math.inf)


def _pieces(q: torch.Tensor, k: torch.Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yields (queries, the keys that they may see), few enough queries at a time for SCORES."""
    rows = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], rows):
        last = min(first + rows, q.shape[2])
        yield slice(first, last), slice(0, last if causal else k.shape[2])


def _math_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    with torch.autocast(q.device.type, enabled=False):  # which would round the scores to 16 bits
        for rows, keys in _pieces(q, k, causal):
            scores = _hide_later(_scores(q[:, :, rows], k[:, :, keys], scale, softcap), rows.start, causal)
            part = scores.logsumexp(-1)
            weights = (scores - part.unsqueeze(-1)).exp()
            out[:, :, rows] = torch.einsum("bhgqk,bhkd->bhgqd", weights, v[:, :, keys].to(weights.dtype)).flatten(1, 2)
            lse[:, :, rows] = part.flatten(1, 2)
    return out, lse


def _math_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide, groups = accumulation_dtype(q.dtype), (k.shape[1], -1)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows, keys in _pieces(q, k, causal):
        scores = _scores(q[:, :, rows], k[:, :, keys], scale, softcap)
        statistics = lse[:, :, rows].unflatten(1, groups).unsqueeze(-1)
        weights = (_hide_later(scores, rows.start, causal) - statistics).exp()
        g = grad[:, :, rows].unflatten(1, groups).to(wide)
        delta = (g * out[:, :, rows].unflatten(1, groups).to(wide)).sum(-1, keepdim=True)
        dv[:, :, keys] += torch.einsum("bhgqk,bhgqd->bhkd", weights, g)
        ds = weights * (torch.einsum("bhgqd,bhkd->bhgqk", g, v[:, :, keys].to(wide)) - delta) * scale
        if softcap is not None:
            ds *= 1 - (scores / softcap).square_()
        dq[:, :, rows] = torch.einsum("bhgqk,bhkd->bhgqd", ds, k[:, :, keys].to(wide)).flatten(1, 2)
        dk[:, :, keys] += torch.einsum("bhgqk,bhgqd->bhkd", ds, q[:, :, rows].unflatten(1, groups).to(wide))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


CPU_FLASH = Kernel(name="torch's flash attention for CPUs", forward=_cpu_forward, backward=_cpu_backward)
FORMULA = Kernel(name="the formula", forward=_math_forward, backward=_math_backward)
