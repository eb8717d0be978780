"""What a step in layer-major order asks of the weights: those of one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from heteromesh.parallel.state.flats import take_out


class LayerWeights(Protocol):
    """Brings layers' weights here and takes them away again; layers by their index. Ranks make the same calls."""

    def begin(self, *, exact: bool = False) -> None:
        """Returns when what is outside layers is here; the layers' weights no longer are.

        exact: they come as they are trained until the next call, not in a dtype to which a pass casts them anyway.
        """

    def fetch(self, layer: int) -> None:
        """Starts to bring a layer's weights here, unless they are or are on their way; returns at once."""

    def show(self, layer: int) -> None:
        """Returns when the layer's weights are here and in its parameters."""

    def hide(self, layer: int) -> None:
        """Takes the weights out of the layer's parameters, but keeps them here: other code must not use them."""

    def drop(self, layer: int) -> None:
        """Takes the weights out of the layer's parameters, and gives their memory back."""


class WholeWeights(LayerWeights):
    """The weights of a rank that has all of them."""

    def begin(self, *, exact: bool = False) -> None:
        return

    def fetch(self, layer: int) -> None:
        return

    def show(self, layer: int) -> None:
        return

    def hide(self, layer: int) -> None:
        return

    def drop(self, layer: int) -> None:
        return


class StashedWeights(LayerWeights):
    """Weights that are all here, yet in a layer's parameters only while it runs: for trials of what uses them."""

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]]) -> None:
        """layers: the parameters that are each layer's alone."""
        self._layers = [[(p, p.data) for p in own] for own in layers]

    def begin(self, *, exact: bool = False) -> None:
        for index in range(len(self._layers)):
            self.hide(index)

    def fetch(self, layer: int) -> None:
        return

    def show(self, layer: int) -> None:
        for parameter, data in self._layers[layer]:
            parameter.data = data

    def hide(self, layer: int) -> None:
        for parameter, _ in self._layers[layer]:
            take_out(parameter)

    def drop(self, layer: int) -> None:
        self.hide(layer)

    def close(self) -> None:
        """Puts all weights back."""
        for index in range(len(self._layers)):
            self.show(index)
