"""Layers whose activations are computed again in the backward instead of kept, under the pass of their forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from heteromesh.parallel.attention.api import ACTIVE_PASS, PassContext, active_pass
from heteromesh.parallel.model.draws import ACTIVE_DRAWS, Draws, active_draws
from heteromesh.parallel.model.undisturbed import state_kept


def recompute_layers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Has these layers recomputed in the backward, until `keep_activations` is called with what this returns."""
    chosen = list(layers)
    for layer in chosen:
        context_fn = partial(_contexts, layer)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=context_fn)
    return chosen


def keep_activations(layers: Iterable[nn.Module]) -> None:
    """Undoes `recompute_layers`."""
    for layer in layers:
        del layer.forward  # what hid the class's own


@contextmanager
def known_in_backward(root: torch.Tensor) -> Iterator[None]:
    """Makes this thread's pass and draws known in backwards from `root` within the block, on autograd's threads too.

    So layers that the model itself computes again there (Transformers' gradient checkpointing) attend and draw as
    before.
    """
    if not root.requires_grad:
        yield
        return
    with ACTIVE_PASS.backward_of(root), ACTIVE_DRAWS.backward_of(root):
        yield


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    # the recomputation may run on another thread of autograd, which does not know the pass, and after the forwards of
    # other passes; its dropouts draw what they drew in the forward that is about to begin
    current, draws = active_pass(), active_draws()
    return nullcontext(), _repeated(layer, current, draws.again() if draws else None)


@contextmanager
def _repeated(layer: nn.Module, context: PassContext | None, draws: Draws | None) -> Iterator[None]:
    # the forward has counted its tokens, where the layer counts any
    with (
        context.active() if context else nullcontext(),
        draws.again().active() if draws else nullcontext(),
        state_kept(layer),
    ):
        yield
