"""Optimizers that are not element-wise: Muon and, for what is no matrix, AdamW; and one that couples all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Makes a group's step with torch's Muon where all of its parameters are matrices, else with AdamW."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            group.setdefault("matrices", all(p.ndim == 2 for p in group["params"]))

    def step(self, closure: Any = None) -> None:
        """Makes a step by gradients alone."""
        for group in self.param_groups:
            if group["params"]:
                kind: Any = torch.optim.Muon if group["matrices"] else torch.optim.AdamW
                inner = kind(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
                inner.state = self.state
                inner.step()


class Coupled(torch.optim.SGD):
    """Scales each step by the norm of all gradients, each element alike."""

    def step(self, closure: Any = None) -> None:
        """Makes a step by gradients alone."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for gradient in gradients:
            gradient.div_(norm)
        super().step()


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Returns matrices and what is none, each once."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if (p.ndim == 2) is matrices]} for matrices in (True, False)]
