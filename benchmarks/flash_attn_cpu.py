"""A stand-in for the flash_attn package on the CPU, so that ring-flash-attn and yunchang run there.

Only what those two call, in bf16 or fp16: their rings are theirs, the kernel of a block is torch's.
"""

# ruff: noqa: ANN001, ANN002, ANN003, ANN202
# the signatures are those of flash_attn 2.8
from __future__ import annotations

import sys
import types

import torch

aten = torch.ops.aten


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    """(out (B, S, H, D), lse (B, H, S), None, None)."""
    operands = [t.transpose(1, 2) for t in (q, k, v)]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*operands, 0.0, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse.contiguous(), None, None


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    """Writes dq, dk and dv."""
    operands = [t.transpose(1, 2) for t in (dout, q, k, v, out)]
    parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *operands, softmax_lse, 0.0, causal, scale=softmax_scale
    )
    for target, part in zip((dq, dk, dv), parts, strict=True):
        target.copy_(part.transpose(1, 2))
    return (softmax_lse,)


def _not_here(*args, **options):
    raise NotImplementedError("the stand-in has no kernels for packed sequences")


def install() -> None:
    """Makes `import flash_attn` find this, and leaves out what needs transformers."""
    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = "2.8.0"
    package.flash_attn_func = _not_here
    package.flash_attn_interface = interface
    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    interface._flash_attn_varlen_forward = interface._flash_attn_varlen_backward = _not_here
    interface.flash_attn_func = interface.flash_attn_varlen_func = _not_here
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = _not_here
    sys.modules.update(
        {
            "flash_attn": package,
            "flash_attn.flash_attn_interface": interface,
            "ring_flash_attn.adapters": adapters,
        }
    )
