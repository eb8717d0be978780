"""Attention of one block of queries over one block of keys, and the exact merge of blocks by logsumexp.

Forward: out = sum_i exp(lse_i - lse) out_i with lse = logsumexp_i(lse_i) over the blocks i of a query row. Backward:
a block's flash backward, called with the merged out and lse, gives exact dK, dV of the block and its share of dQ.
On the CPU torch's flash kernel; on CUDA torch's flash kernel for 16-bit values where it passes a check (flash.py);
else the formula, whose memory grows with Sq * Sk.
Shapes: q (B, H, Sq, D), k and v (B, Hk, Sk, D) with H a multiple of Hk; lse (B, H, Sq) in float32 (or float64).
"""

from __future__ import annotations

import math
from functools import cache

import torch

from heteromesh.comm.dtypes import accumulation_dtype
from heteromesh.parallel.attention.kernels.flash import DTYPES, FLASH, Kernel, Kind, checked

aten = torch.ops.aten


def forward_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, lse) of one block.

    The last dimension must be dense and neither side empty (torch's CPU kernel is silently wrong on the one and kills
    the process on the other); causal blocks must be square (kernels differ in how they align others).
    """
    _guard(q, k, v, causal)
    return _kernel(q, k, causal).forward(q, k, v, causal, scale)


def backward_block(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) of one block, given the out and lse of the whole rows. Limits as in `forward_block`."""
    _guard(q, k, v, causal)
    return _kernel(q, k, causal).backward(grad, q, k, v, out, lse, causal, scale)


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


def _kernel(q: torch.Tensor, k: torch.Tensor, causal: bool) -> Kernel:
    if q.device.type == "cpu":
        return CPU_FLASH
    if q.device.type != "cuda" or q.dtype not in DTYPES or q.shape[-1] % 8:
        return FORMULA
    return _cuda_kernel(Kind(q.device, q.dtype, q.shape[-1], causal, q.shape[1] // k.shape[1]))


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


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Returns (B, Hk, G, Sq, Sk) scaled scores, G query heads per key head, at least float32."""
    wide = accumulation_dtype(q.dtype)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, k.to(wide)) * scale
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(mask, -math.inf)
    return scores


def _math_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # which would round the scores to 16 bits
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        out = torch.einsum("bhgqk,bhkd->bhgqd", weights, v.to(weights.dtype)).flatten(1, 2)
    return out.to(q.dtype), lse.flatten(1, 2)


def _math_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, groups = _scores(q, k, causal, scale), (k.shape[1], -1)
    wide = scores.dtype
    weights = (scores - lse.unflatten(1, groups).unsqueeze(-1)).exp()
    g = grad.unflatten(1, groups).to(wide)
    delta = (g * out.unflatten(1, groups).to(wide)).sum(-1, keepdim=True)
    dv = torch.einsum("bhgqk,bhgqd->bhkd", weights, g)
    ds = weights * (torch.einsum("bhgqd,bhkd->bhgqk", g, v.to(wide)) - delta) * scale
    dq = torch.einsum("bhgqk,bhkd->bhgqd", ds, k.to(wide)).flatten(1, 2)
    dk = torch.einsum("bhgqk,bhgqd->bhkd", ds, q.unflatten(1, groups).to(wide))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


CPU_FLASH = Kernel(name="torch's flash attention for CPUs", forward=_cpu_forward, backward=_cpu_backward)
FORMULA = Kernel(name="the formula", forward=_math_forward, backward=_math_backward)
