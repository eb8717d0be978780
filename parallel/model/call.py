"""How a model is called for its per-token losses, whichever of the two forms it has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from heteromesh.comm.dtypes import in_accumulation_dtype

IGNORED = -100
"""Label of a token that has nothing to predict (PyTorch's default ignore_index)."""


class ModelCall:
    """Calls `model(input, position_ids=...)`, which returns a tensor or an object with `.logits`.

    A model that takes `targets` returns per-token losses, others logits (1, n, vocab).
    """

    def __init__(self, model: nn.Module) -> None:
        names = inspect.signature(model.forward).parameters
        self._model, self._takes_targets = model, "targets" in names
        self._options = {"use_cache": False} if "use_cache" in names else {}

    def output(self, x: torch.Tensor, positions: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """Returns what the model makes of x (tokens, or hidden states in a pipeline); positions (1, n)."""
        result: Any = self._model(x, position_ids=positions, **self._options, **more)
        output: torch.Tensor = result if isinstance(result, torch.Tensor) else result.logits
        return output

    def losses(self, x: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns losses (n,), in float32 at least, 0 where the label is IGNORED; positions and labels (1, n)."""
        if self._takes_targets:
            losses = in_accumulation_dtype(self.output(x, positions, targets=labels)).view(-1)
        else:
            logits = in_accumulation_dtype(self.output(x, positions)).flatten(0, 1)
            losses = functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.masked_fill(labels.view(-1) == IGNORED, 0.0)
