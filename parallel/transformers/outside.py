"""Attention outside passes for what `sdpa` has no argument for: capped scores and sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from heteromesh.parallel.attention.scoring import default_scale


def formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Returns (B, H, Sq, D); query (B, H, Sq, D), key and value (B, Hk, Sk, D), sinks (H,).

    mask: boolean, broadcast to (B, H, Sq, Sk), True where a key is seen; None: as `causal` says, one query sees all.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * default_scale(scaling, query.shape[-1])
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        # not -inf: rows of padding see nothing, and would be NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return functional.dropout(weights[..., : key.shape[2]], dropout) @ value
