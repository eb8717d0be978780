"""Summed gradients of the ranges that a rank holds, handed out to its fragments and clipped by the norm of all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.world import World
from heteromesh.parallel.state.fragments import Fragment


def hand_out_ranges(fragments: Sequence[Fragment], starts: Sequence[int], summed: Summed) -> None:
    """Makes the sums the fragments' gradients, as views. starts: where in its bucket each summed tensor begins."""
    for fragment in fragments:
        fragment.tensor.grad = None
        if summed.present[fragment.parameter]:
            start = starts[fragment.bucket]
            own = summed.tensors[fragment.bucket][fragment.first - start : fragment.last - start]
            fragment.tensor.grad = own.view(fragment.tensor.shape)


def clip_ranges(fragments: Sequence[Fragment], limit: float, world: World) -> float:
    """Scales the fragments' gradients so that their norm over all ranks is at most `limit`; returns the norm before."""
    mine = [f.tensor.grad for f in fragments if f.tensor.grad is not None]
    squares = torch.zeros(world.size, dtype=torch.float64)
    squares[world.rank] = squared_norm(mine)
    # one number a rank, added in rank order: the same bits everywhere
    norm = math.sqrt(sum(world.sum(squares).tolist()))
    if math.isfinite(norm):
        wide = max((g.dtype for g in mine), key=lambda dtype: dtype.itemsize, default=torch.float32)
        total = torch.tensor(norm, dtype=torch.promote_types(wide, torch.float32), device=world.device)
        nn.utils.clip_grads_with_norm_([f.tensor for f in fragments], limit, total)
    return norm


def squared_norm(tensors: Sequence[torch.Tensor]) -> float:
    """Returns that of all together; norms of low-precision tensors are formed in float32."""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    norms = [torch.linalg.vector_norm(t, dtype=dtype).double() for t, dtype in zip(tensors, wide, strict=True)]
    return float(torch.stack(norms).square().sum()) if norms else 0.0
