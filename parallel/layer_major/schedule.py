"""All passes of a rank in layer-major order: through one layer, then the next, and back likewise.

The caller's own thread runs every layer and every backward; passes' threads run what is between layers. So a layer's
weights are brought here once for all passes, whatever their number, in the forward and once in the backward, and its
gradients are complete as soon as the last pass has come back through it. A rank without passes does all that is
collective about a layer with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from heteromesh.errors import UserError
from heteromesh.parallel.layer_major.arguments import WAY_OUT
from heteromesh.parallel.layer_major.pass_run import PassBody, PassRun
from heteromesh.parallel.layer_major.stubs import LayerStubs
from heteromesh.parallel.layer_major.weights import LayerWeights

Timed = Callable[[int, str], AbstractContextManager[None]]
"""Returns a context for a part of a pass: the pass's place among this rank's, and what is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOrder:
    """In which order a model calls its layers; the same on all ranks."""

    layers: tuple[int, ...]
    """By position, the index of the layer; one may come several times."""
    first_backward: int = 0
    """The first position whose layer has anything to do in the backward; layers below are frozen, and their inputs."""
    mappings: bool = False
    """Whether layers are given mappings, which later layers may change: ordinary passes can't compute them again."""


class LayerMajorSchedule:
    """Takes passes through the layers of one model."""

    def __init__(self, stubs: LayerStubs, order: LayerOrder, weights: LayerWeights, device: torch.device) -> None:
        self._stubs, self._order, self._weights, self._device = stubs, order.layers, weights, device
        self._first = order.first_backward
        self.first_needed = len(order.layers)
        """The first position at which a pass has had anything to do in the backward so far."""
        self._lowest = {layer: position for position, layer in reversed(list(enumerate(order.layers)))}

    def run(
        self,
        bodies: Sequence[PassBody],
        *,
        done: Callable[[int], None],
        timed: Timed,
        compared: bool = False,
        kept: int = 0,
    ) -> None:
        """Runs forward and backward of passes.

        bodies: the passes. done: called for each layer (by index) when its gradients are complete, on every
        rank in the same order. compared: raise UserError where a layer gives something else when computed again.
        kept: how many of the last positions' activations are kept, so that these layers are not computed again here.
        """
        self._weights.begin()
        if self._order:
            self._weights.fetch(self._order[0])
        passes = [PassRun(body, self._stubs, self._device) for body in bodies]
        try:
            self._forward(passes, timed, compared, len(self._order) - kept)
            self._backward(passes, done, timed)
        finally:
            for each in passes:
                each.abandon()

    def _forward(self, passes: Sequence[PassRun], timed: Timed, compared: bool, kept_from: int) -> None:
        self._resume(passes, passes, 0, timed, "to the first layer")
        for position, layer in enumerate(self._order):
            following = self._order[position + 1 : position + 2]
            for index in following:
                self._weights.fetch(index)
            self._weights.show(layer)
            name = self._stubs.layers[layer].name
            here = [p for p in passes if p.waiting is not None and p.waiting.layer.index == layer]
            for each in here:
                with timed(passes.index(each), name):
                    needs_gradient = each.run_layer(position, compared=compared, keep=position >= kept_from)
                if needs_gradient:
                    self.first_needed = min(self.first_needed, position)
                if needs_gradient and position < self._first:
                    raise UserError(
                        f"layer {name} needs gradients and needed none when the model was tried: freeze parameters "
                        f"before training starts, or {WAY_OUT}"
                    )
            self._put_away(layer, kept=not following or following[0] == layer)
            self._resume(passes, here, position + 1, timed, f"after {name}")

    def _resume(
        self, passes: Sequence[PassRun], some: Sequence[PassRun], position: int, timed: Timed, what: str
    ) -> None:
        """Lets passes go on to layers at this position or later. Raises UserError for layers that come earlier."""
        for each in some:
            with timed(passes.index(each), what):
                each.resume()
            call = each.waiting
            if call is not None and call.layer.index not in self._order[position:]:
                raise UserError(
                    f"layer {call.layer.name} is called {what}, which is not the order in which the model called its "
                    "layers when it was tried: call them in one order, drawing what is skipped from torch's own "
                    f"generator, or {WAY_OUT}"
                )

    def _backward(self, passes: Sequence[PassRun], done: Callable[[int], None], timed: Timed) -> None:
        positions = list(range(self._first, len(self._order)))[::-1]
        for place, position in enumerate(positions):
            layer, following = self._order[position], [self._order[p] for p in positions[place + 1 : place + 2]]
            for index in following:
                self._weights.fetch(index)
            self._weights.show(layer)
            for number, each in enumerate(passes):
                with timed(number, f"back through {self._stubs.layers[layer].name}"):
                    each.backward(position)
            self._put_away(layer, kept=following == [layer])
            if self._lowest[layer] == position:
                done(layer)
        for number, each in enumerate(passes):
            with timed(number, "back to the embeddings"):
                each.finish()
        if self._order and not positions:
            self._weights.drop(self._order[-1])

    def _put_away(self, layer: int, *, kept: bool) -> None:
        if kept:
            self._weights.hide(layer)
        else:
            self._weights.drop(layer)
