"""How a model is called for its per-token losses, whichever of the two forms it has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from heteromesh.comm.dtypes import in_accumulation_dtype
from heteromesh.errors import UserError

IGNORED = -100
"""Label of a token that has nothing to predict (PyTorch's default ignore_index)."""


class ModelCall:
    """Calls `model(input, position_ids=...)`, which returns a tensor or an object with `.logits`.

    A model that takes `targets` returns per-token losses, others logits (1, n, vocab). Raises UserError for a model
    that takes no positions, and when it returns something else or losses beside its logits.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(uncompiled(model).forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if "position_ids" not in parameters and not takes_any:
            raise UserError(
                f"{_name(model)}.forward takes {', '.join(parameters) or 'nothing'} and no position_ids: sequences are "
                "packed and split, so a model must be told each token's position in its own; add the argument and use "
                "it"
            )
        self._model, self._takes_targets = model, "targets" in parameters
        self._needs_targets = self._takes_targets and parameters["targets"].default is inspect.Parameter.empty
        # wrappers (PEFT's) hand on what they don't know
        has_cache = takes_any and hasattr(getattr(model, "config", None), "use_cache")
        self._options = {"use_cache": False} if "use_cache" in parameters or has_cache else {}

    @property
    def takes_targets(self) -> bool:
        """Whether the model itself computes the losses."""
        return self._takes_targets

    def output(self, x: torch.Tensor, positions: torch.Tensor | None, **more: torch.Tensor) -> torch.Tensor:
        """Returns what the model makes of x (tokens, or hidden states in a pipeline).

        positions: (1, n); None: those that the model itself gives.
        """
        told = {} if positions is None else {"position_ids": positions}
        result: Any = self._model(x, **told, **self._options, **more)
        return result if isinstance(result, torch.Tensor) else _logits(result, self._model)

    def outputs(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Returns what a loss of the user's own gets, (n, ...), in float32 at least. Raises UserError for others."""
        if self._needs_targets:
            raise UserError(
                f"{_name(self._model)}.forward needs targets, from which it makes losses itself, and there is a loss "
                "of your own: leave loss= out, or give targets a default with which the model returns its outputs"
            )
        made = in_accumulation_dtype(self.output(x, positions))
        if made.shape[:2] != x.shape[:2]:
            raise UserError(
                f"{_name(self._model)} returned {tuple(made.shape)} for {x.shape[1]} tokens in a row: with a "
                f"loss of your own it must return a row for each token, (1, {x.shape[1]}, ...), from which the "
                "loss takes what it needs (batch.last(outputs): of each sequence's last token)"
            )
        return made.flatten(0, 1)

    def losses(self, x: torch.Tensor, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """Returns losses (n,), in float32 at least, 0 where the label is IGNORED; labels (1, n)."""
        if self._takes_targets:
            losses = in_accumulation_dtype(self.output(x, positions, targets=labels)).view(-1)
        else:
            logits = in_accumulation_dtype(self.output(x, positions)).flatten(0, 1)
            losses = functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.masked_fill(labels.view(-1) == IGNORED, 0.0)


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the module that torch.compile has wrapped, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Runs what torch.compile has wrapped as it is written within the block."""
    with torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext():
        yield


def is_compiled(model: nn.Module) -> bool:
    """Returns whether torch.compile has wrapped the model or a part of it."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def plain_name(name: str) -> str:
    """Returns a module's or tensor's name without torch.compile's wrappers."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _logits(result: Any, model: nn.Module) -> torch.Tensor:
    logits = getattr(result, "logits", None)
    if not isinstance(logits, torch.Tensor):
        what = f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, (tuple, list, dict)) else "")
        raise UserError(
            f"{_name(model)} returned {what}: it must return a tensor (logits (1, n, vocabulary), or losses (1, n) "
            "where it takes targets) or an object with .logits; wrap it in a module that does"
        )
    values = result.items() if isinstance(result, Mapping) else vars(result).items()
    weights = vars(getattr(uncompiled(model), "config", object)).items()
    for name, value in values:
        if not isinstance(value, torch.Tensor) or value.dim() or not value.is_floating_point():
            continue
        # Transformers weighs its routers' loss with a setting of its own
        if "aux" in name and any(key.endswith("aux_loss_coef") and not weight for key, weight in weights):
            continue
        raise UserError(
            f"{_name(model)} returned {name} = {float(value.detach()):.4g} beside its logits, a loss that would be "
            "left out: turn it off (output_router_logits=False for Transformers' routers), or wrap the model in a "
            "module that takes targets and returns losses by token with their share of it"
        )
    return logits


def _name(model: nn.Module) -> str:
    return type(uncompiled(model)).__name__
