"""Llama-4 scales the queries of layers without rotary embeddings by their place in the row, which in a pass is not
their position in the sequence.
"""

from __future__ import annotations

from typing import Any

import torch

from heteromesh.parallel.attention.api import active_pass


def scaled_by_position(module: Any, query: torch.Tensor) -> torch.Tensor:
    """Returns the query (1, H, n, D) of a pass as its positions would have scaled it; of other models as it is."""
    context = active_pass()
    if context is None or not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    segments = context.layout.segments[context.member]
    if max(query.shape[2], *(s.end for s in segments)) < module.floor_scale:
        return query  # all scales are 1 up to there
    positions = torch.cat([torch.arange(s.start, s.end, device=query.device) for s in segments])
    right, done = (_scale(module, p) for p in (positions, torch.arange(len(positions), device=query.device)))
    return (query * (right / done).view(1, 1, -1, 1)).to(query.dtype)


def _scale(module: Any, positions: torch.Tensor) -> torch.Tensor:
    """Returns the scales (n,) by which Llama4TextAttention multiplies queries at these positions."""
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    scales: torch.Tensor = torch.log1p(steps) * module.attn_scale + 1.0
    return scales
