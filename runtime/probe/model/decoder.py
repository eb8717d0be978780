"""A plain decoder of a ModelSpec's shape, for timing: what a model of that shape computes, with random weights."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as functional
from torch import nn

from heteromesh.parallel.attention.api import attention
from heteromesh.planner.model.spec import ModelSpec


class Decoder(nn.Module):
    """Maps token ids (1, n) and positions (1, n) to logits (1, n, vocab).

    RMSNorm, rotary positions, grouped-query attention and an MLP in every layer. A mixture of experts is one MLP as
    wide as the experts that a token goes through: the operations of a balanced router without its exchanges.
    """

    def __init__(self, spec: ModelSpec, layers: int | None = None) -> None:
        """layers: instead of the shape's own."""
        super().__init__()
        self.dim = spec.head_dim
        self.embed = nn.Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(_Layer(spec) for _ in range(spec.layers if layers is None else layers))
        self.norm = nn.RMSNorm(spec.hidden)
        self.head = nn.Linear(spec.hidden, spec.vocab, bias=False)
        if spec.tied_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        half = torch.arange(0, self.dim - 1, 2, device=position_ids.device) / self.dim
        angles = position_ids[:, None, :, None] / 10_000.0**half
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return cast(torch.Tensor, self.head(self.norm(x)))


class _Layer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.split = [spec.heads, spec.kv_heads, spec.kv_heads]
        self.dim = spec.head_dim
        self.width = spec.intermediate * spec.active_experts
        self.gated = spec.gated_mlp
        self.attention_norm, self.mlp_norm = nn.RMSNorm(spec.hidden), nn.RMSNorm(spec.hidden)
        self.qkv = nn.Linear(spec.hidden, sum(self.split) * self.dim, bias=False)
        self.out = nn.Linear(spec.heads * self.dim, spec.hidden, bias=False)
        self.up = nn.Linear(spec.hidden, (2 if self.gated else 1) * self.width, bias=False)
        self.down = nn.Linear(self.width, spec.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, tokens, sum(self.split), self.dim).transpose(1, 2)
        q, k, v = heads.split(self.split, 1)
        mixed = attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        up = self.up(self.mlp_norm(x))
        inner = functional.silu(up[..., : self.width]) * up[..., self.width :] if self.gated else functional.gelu(up)
        return cast(torch.Tensor, x + self.down(inner))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x (B, H, S, D) by position (arXiv 2104.09864), cos and sin (B, 1, S, D / 2); an odd last column stays."""
    half = x.shape[-1] // 2
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
