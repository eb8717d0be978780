"""Code that calls the model outside of passes (evaluations), each layer with its weights there only while it runs.

Ranks may call the model differently often. So before a layer runs they tell each other what they wait for, and the
weights of one layer come to all ranks at once, whoever uses them; what the code exchanges itself has its turn when no
rank waits for a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from heteromesh.parallel.layer_major.baton import PassThread
from heteromesh.parallel.layer_major.weights import LayerWeights

T = TypeVar("T")
_EXCHANGE, _ENDED = -1, -2
"""What a rank waits for that waits for no layer."""


class ForwardThread(PassThread[T]):
    """Runs such code; it waits for layers, by their index, and for its turn to exchange."""


def take_turn() -> None:
    """Returns when all ranks have come to an exchange, in code that `run_forwards` runs; at once in any other."""
    thread = threading.current_thread()
    if isinstance(thread, ForwardThread):
        thread.wait(_EXCHANGE)


def run_forwards(
    body: Callable[[], T], weights: LayerWeights, gather: Callable[[Any], list[Any]], layers: int, device: torch.device
) -> T:
    """Returns the body's result; all ranks call this. gather: a value from every rank. layers: how many there are."""
    thread, here = ForwardThread(body, device), set[int]()
    weights.begin(exact=True)
    try:
        waits = _resumed(thread)
        while (first := _next(gather(waits))) != _ENDED:
            if first != _EXCHANGE:
                following = {first + 1} if first + 1 < layers else set()
                for layer in sorted(here - following - {first}):
                    weights.drop(layer)
                here = following | {first}
                for layer in sorted(here):
                    weights.fetch(layer)
                weights.show(first)
            if waits == first:
                waits = _resumed(thread)
            if first != _EXCHANGE:
                weights.hide(first)
    finally:
        thread.abandon()
        weights.begin()
    assert thread.ended
    return thread.result  # type: ignore[return-value]


def _next(everyone: list[int]) -> int:
    """Returns what all ranks do next: the lowest layer that one waits for, so that those behind catch up."""
    return min((w for w in everyone if w >= 0), default=max(everyone))


def _resumed(thread: ForwardThread[Any]) -> int:
    waits = thread.resume()
    return _ENDED if waits is None else int(waits)
