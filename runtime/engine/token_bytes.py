"""What a token adds to a rank's memory, measured on the model itself: passes of two sizes, and the difference.

Weights and everything else that doesn't grow with tokens cancel out. A pass before them leaves its gradients: where
they are made at the end of a backward, they would hide what activations take before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.parallel.layer_major.schedule import LayerOrder
from heteromesh.parallel.layer_major.weights import StashedWeights
from heteromesh.parallel.model.undisturbed import undisturbed
from heteromesh.planner.ownership.memory import TokenBytes
from heteromesh.runtime.engine.layer_major import LayerMajor, PassWork, sample_work, untimed
from heteromesh.runtime.engine.live_bytes import LiveBytes, live_bytes
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.work.reader import Reader

LONGEST = 256
"""Tokens of the larger pass, at most; the other one has half of them."""


def pass_token_bytes(engine: PassMajor, reader: Reader, device: torch.device) -> TokenBytes:
    """Returns the bytes of passes that go through all layers. No gradients are left; the model is as it was."""
    works, world, peaks = _works(reader, device), World(device=device), []
    with undisturbed(engine.model):
        engine.forward_backward(works[0].context, works[0].batch, works[0].divisor, world)
        for work in works:
            live = live_bytes(device)
            with live:
                live.peak_since()
                before = live.now
                engine.forward_backward(work.context, work.batch, work.divisor, world)
            peaks.append((work.divisor, live.peak_since() - before))
        _drop_gradients(engine.model)
    return TokenBytes(per_pass=_slope(peaks))


def layer_token_bytes(engine: LayerMajor, reader: Reader, device: torch.device, order: LayerOrder) -> TokenBytes:
    """Returns the bytes of passes in layer-major order: of what all layers are given, of one layer or the loss, and of
    the activations of each layer where layers are called once each.

    The engine is not attached, before and after. No gradients are left.
    """
    weights = StashedWeights(engine.own_parameters)
    works, world, each_once = _works(reader, device), World(device=device), len({*order.layers}) == len(order.layers)
    names = [engine.layer_names[index] for index in order.layers]
    again, kept = list[_Parts](), list[_Parts]()
    engine.attach(device, order, weights)
    try:
        with undisturbed(engine.model):
            engine.work(works[:1], world, untimed, lambda _: None)
            for work in works:
                for found, count in ((again, 0), (kept, len(names))) if each_once else ((again, 0),):
                    parts = _Parts(live_bytes(device))
                    engine.work([work], world, parts.watched, lambda _: None, inside=parts.inside, kept=count)
                    found.append(parts)
            _drop_gradients(engine.model)
    finally:
        weights.close()
        engine.detach()

    def slope(found: Sequence[_Parts], bytes_of: Callable[[_Parts], int]) -> float:
        return _slope([(work.divisor, bytes_of(parts)) for work, parts in zip(works, found, strict=True)])

    def by_layer(name: str) -> float:
        return max(0.0, slope(kept, lambda parts: parts.grown[name]) - slope(again, lambda parts: parts.grown[name]))

    return TokenBytes(
        per_pass=slope(again, lambda parts: parts.most),
        per_step=slope(again, lambda parts: parts.kept),
        by_layer=tuple(by_layer(name) for name in names) if each_once else (),
    )


class _Parts:
    """Watches what each part of a pass adds to what was there when it began."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self.most = self.kept = 0
        """Bytes of the part that adds most, and of what is there when the backward through the layers begins."""
        self.grown: dict[str, int] = {}
        """By part, bytes that it leaves."""
        self._backward = False

    @contextmanager
    def watched(self, index: int, part: str) -> Iterator[None]:
        del index
        with self._live:
            if part.startswith("back") and not self._backward:
                self._backward, self.kept = True, self._live.now
            self._live.peak_since()
            before = self._live.now
            yield
            self.most = max(self.most, self._live.peak_since() - before)
            self.grown[part] = self._live.now - before

    @contextmanager
    def inside(self) -> Iterator[None]:
        """For the pass's own thread, of which operations are seen only if it enters the counter too."""
        with self._live:
            yield


def _works(reader: Reader, device: torch.device) -> Sequence[PassWork]:
    """Returns passes of one sequence each, of two sizes; `divisor` is their tokens."""
    longest = max(2, min(LONGEST, max(reader.lengths)))
    return [sample_work(reader, device, count, divisor=count) for count in (longest // 2, longest)]


def _slope(points: Sequence[tuple[float, int]]) -> float:
    """Returns bytes a token."""
    (few, less), (many, more) = points
    return max(1.0, (more - less) / max(1, many - few))


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
