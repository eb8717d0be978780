"""A tiny model, and the one-process reference that every plan must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional

from instances import HEADS, random_costs, random_lengths, random_step
from llama import Llama, LlamaConfig

__all__ = ["TINY", "random_costs", "random_lengths", "random_step", "reference"]
TINY = LlamaConfig(vocab=61, layers=2, hidden=32, heads=HEADS, kv_heads=2, intermediate=48)


def reference(model: Llama, sequences: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """(loss, gradients) of plain PyTorch in one process: sequence by sequence, loss by all valid tokens."""
    valid = sum(len(s) - 1 for s in sequences)
    model.zero_grad()
    total = 0.0
    for tokens in sequences:
        if len(tokens) < 2:
            continue
        logits = model(tokens[None])[0, :-1]
        loss = functional.cross_entropy(logits, tokens[1:], reduction="sum") / valid
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
