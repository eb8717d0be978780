"""Layers whose activations are computed again in the backward instead of kept, under the pass of their forward."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from heteromesh.parallel.attention.api import active_pass


def recompute_layers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Has these layers recomputed in the backward, until `keep_activations` is called with what this returns."""
    chosen = list(layers)
    for layer in chosen:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=_contexts)
    return chosen


def keep_activations(layers: Iterable[nn.Module]) -> None:
    """Undoes `recompute_layers`."""
    for layer in layers:
        del layer.forward  # what hid the class's own


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    # the recomputation may run on another thread of autograd, which does not know the pass, and after the forwards of
    # other passes
    current = active_pass()
    return nullcontext(), current.active() if current else nullcontext()
