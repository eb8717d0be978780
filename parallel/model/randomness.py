"""Randomness that does not depend on the plan.

Inside a pass a dropout draws its mask for each token by itself, from a counter keyed by the job's seed, the step, the
token's sequence and position, and the place in the model. So loss and gradients are the same however the batch is
packed, split or recomputed. Everything else that is random (a layer skipped now and then) is drawn from generators that
are seeded by the job's seed and the step when the pass begins and, torch's, when it enters or leaves a layer: each pass
draws the same, on whatever rank and after whatever passes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from heteromesh.parallel.attention.api import active_pass
from heteromesh.parallel.attention.scope import never_compiled
from heteromesh.parallel.model.counter import key_of
from heteromesh.parallel.model.draws import Draws, TokenPlaces, active_draws
from heteromesh.parallel.model.dropout import dropouts_replaced
from heteromesh.parallel.model.layers import outermost_layers


class PassRandomness:
    """Draws the random numbers of a model's passes. `close` takes its hooks off the model.

    follows, ends: the name of the layer before the model's first, and whether the model has the whole model's end. A
    pipeline stage may begin or end between two layers; a dropout before its first or after its last layer is another
    stage's then, and does nothing in this one.
    """

    def __init__(self, model: nn.Module, *, follows: str | None = None, ends: bool = True) -> None:
        layers = outermost_layers(model)
        self._begin = f"after {follows}" if follows else ""
        self._foreign = ([self._begin] if follows else []) + ([] if ends else [f"after {list(layers)[-1]}"])
        self._hooks = []
        for name, layer in layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(layer.register_forward_hook(self._entering(f"after {name}")))

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def during(self, seed: int, step: int, places: TokenPlaces) -> Iterator[None]:
        """Leaves draws no more to the plan within the block, which holds forward and backward of one pass.

        Afterwards the generators of torch, Python and NumPy go on where they were before.
        """
        device = places.sequences.device
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), dropouts_replaced():
            draws = Draws(key_of(seed, step), places, self._foreign, self)
            random.seed(draws.key)
            np.random.seed(draws.key & 0xFFFFFFFF)
            draws.enter(self._begin)
            try:
                with draws.active():
                    yield
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])

    def _entering(self, section: str) -> Callable[..., None]:
        @never_compiled
        def hook(*_: Any) -> None:
            draws = active_draws()
            # a layer may have hooks of others too
            if draws and draws.source is self:
                draws.enter(section)
                context = active_pass()
                if context is not None and context.order is not None:
                    context.order.layer = section

        return hook
