"""How one call of attention scores queries against keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heteromesh.planner.model.mask import CAUSAL, Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Scores are scale * q . k, or softcap * tanh(scale * q . k / softcap), of the keys that the mask shows."""

    scale: float
    mask: Mask = CAUSAL
    softcap: float | None = None


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scoring, torch.Tensor | None], torch.Tensor]
"""(q, k, v, scoring, sinks) -> out, all heads first: (1, heads, tokens, dim); sinks (H,), one logit a query head."""


def default_scale(scale: float | None, dim: int) -> float:
    """Returns 1 / sqrt(dim) unless given."""
    return 1.0 / math.sqrt(dim) if scale is None else scale
