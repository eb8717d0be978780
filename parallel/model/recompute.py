"""Layers whose activations are computed again in the backward instead of kept, under the pass of their forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from heteromesh.parallel.attention.api import PassContext, active_pass
from heteromesh.parallel.model.draws import Draws, active_draws


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
    # other passes; its dropouts draw what they drew in the forward that is about to begin
    current, draws = active_pass(), active_draws()
    return nullcontext(), _repeated(current, draws.again() if draws else None)


@contextmanager
def _repeated(context: PassContext | None, draws: Draws | None) -> Iterator[None]:
    with context.active() if context else nullcontext(), draws.again().active() if draws else nullcontext():
        yield
