"""Torch's flash attention on CUDA as a block kernel, and the check that a kernel must pass before it is used.

The operators are private to torch: layouts, what logsumexp is and how arguments are read could change without notice,
and a wrong answer would look like any other. So the first block of every kind is preceded by a small one of random
numbers beside the formula: forward, and backward with an out and lse that are not the block's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

aten = torch.ops.aten
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float], tuple[torch.Tensor, torch.Tensor]]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Backward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool, float], Gradients
]
DTYPES = (torch.bfloat16, torch.float16)
ROUNDINGS = 4
"""By which a kernel may differ from the formula, relative to a tensor's largest element."""
LSE_ERROR = 1e-3
ROWS, KEYS = 200, 136
"""Of the checked block: no multiples of a kernel's tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Attention of one block. Tensors and limits are those of `kernels.forward_block` and `backward_block`."""

    name: str
    forward: Forward
    """(q, k, v, causal, scale) -> (out, lse)."""
    backward: Backward
    """(grad, q, k, v, out, lse, causal, scale) -> (dq, dk, dv), given the out and lse of whole rows."""


class Kind(NamedTuple):
    """Blocks that a kernel treats alike."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    causal: bool
    groups: int
    """Query heads per key head."""


def checked(candidate: Kernel, formula: Kernel, kind: Kind) -> Kernel:
    """Returns the candidate if it computes such blocks as the formula does, else the formula, with a warning."""
    try:
        fault = _disagreement(candidate, formula, kind)
    except Exception as error:  # whatever a private operator may raise
        fault = f"raises {type(error).__name__} ({str(error).splitlines()[0] if str(error) else 'no text'})"
    if fault is None:
        return candidate
    warnings.warn(
        f"{candidate.name} {fault} on {kind.device} with {kind.dtype}, head dim {kind.head_dim}, causal={kind.causal}, "
        f"{kind.groups} query heads a key head: {formula.name} is used instead, which is slow",
        RuntimeWarning,
        stacklevel=2,
    )
    return formula


def _disagreement(candidate: Kernel, formula: Kernel, kind: Kind) -> str | None:
    """Returns what differs in a small random block, in words; None where nothing does."""
    scale, keys = 1 / math.sqrt(kind.head_dim), ROWS if kind.causal else KEYS
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, rows: int) -> torch.Tensor:
        # in memory as tiles are: rows first
        values = torch.randn(rows, heads, kind.head_dim, generator=generator)
        return values.to(kind.device, kind.dtype).transpose(0, 1).unsqueeze(0)

    heads = 2 * kind.groups
    q, grad, k, v = draw(heads, ROWS), draw(heads, ROWS), draw(2, keys), draw(2, keys)
    block = formula.forward(q, k, v, kind.causal, scale)
    tried = candidate.forward(q, k, v, kind.causal, scale)
    given = (grad, q, k, v, draw(heads, ROWS), block[1] + 0.5)
    wanted = formula.backward(*given, kind.causal, scale)
    got = candidate.backward(*given, kind.causal, scale)
    limit = ROUNDINGS * torch.finfo(kind.dtype).eps
    checks = [("lse", tried[1], block[1], LSE_ERROR), ("out", tried[0], block[0], limit * _size(block[0]))]
    checks += [(n, a, b, limit * _size(b)) for n, a, b in zip(("dq", "dk", "dv"), got, wanted, strict=True)]
    for name, a, b, error in checks:
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"gives {name} as {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}"
        far = _size(a.to(torch.float64) - b)
        if not far <= error:  # not a number is not near either
            return f"gives {name} that differs from the formula by {far:.2g}"
    return None


def _size(x: torch.Tensor) -> float:
    return float(x.abs().max())


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    sizes = (None, None, q.shape[1], k.shape[1])
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *sizes, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    sizes = (None, None, q.shape[1], k.shape[1])
    # of the random numbers that dropout would use
    state, offset = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))
    with _deterministic():  # the operator reads lse as dense, whatever its strides
        dq, dk, dv = aten._flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), *sizes, 0.0, causal, state, offset, scale=scale
        )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Asks for fixed order: without it the operator adds up dq in the order in which its threads happen to finish."""
    was, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=only_warns)


FLASH = Kernel(name="torch's flash attention", forward=_forward, backward=_backward)
