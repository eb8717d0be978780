"""How many tokens and positions a model knows: the sizes of its tables, found by looking at what they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.model.call import ModelCall, eagerly, plain_name
from heteromesh.parallel.model.undisturbed import undisturbed

_TOKENS = 3


@dataclass(slots=True)
class Tables:
    """Sizes, and the names of the modules that have them; None where there is no such table."""

    vocabulary: int | None = None
    vocabulary_name: str = ""
    positions: int | None = None
    positions_name: str = ""
    outputs: int | None = None
    """Of the logits; None where the model computes losses itself."""


@torch.no_grad()
def find_tables(model: nn.Module) -> Tables:
    """Calls the model once with three tokens 0, and notes which nn.Embedding is asked for tokens, which for
    positions."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
    positions = torch.arange(_TOKENS, device=device)[None]
    found = Tables()

    def looking(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(module, nn.Embedding) and isinstance(args[0], torch.Tensor):
                _note(found, name, module, args[0], positions)

        return hook

    embeddings = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    hooks = [m.register_forward_pre_hook(looking(plain_name(n))) for n, m in embeddings]
    call = ModelCall(model)
    try:
        with undisturbed(model), eagerly(model):
            if not call.takes_targets:
                found.outputs = call.output(tokens, positions).shape[-1]
            elif embeddings:
                call.losses(tokens, positions, tokens)
    except UserError:
        raise
    except Exception:
        pass  # such as a table of fewer than three: the trial of passes will tell
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _note(found: Tables, name: str, module: nn.Embedding, asked: torch.Tensor, positions: torch.Tensor) -> None:
    if asked.numel() != _TOKENS or asked.is_floating_point():
        return
    if not bool(asked.any()):
        if found.vocabulary is None:
            found.vocabulary, found.vocabulary_name = module.num_embeddings, name
        return
    # some tables begin with rows that are no position (OPT)
    before = asked.view(1, -1) - positions
    if found.positions is None and bool((before == before[0, 0]).all()):
        found.positions, found.positions_name = module.num_embeddings - int(before[0, 0]), name
