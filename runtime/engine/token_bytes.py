"""What a token adds to a rank's memory, measured on the model itself: passes of two sizes, and the difference.

Weights and everything else that doesn't grow with tokens cancel out. A pass before them leaves its gradients: where
they are made at the end of a backward, they would hide what activations take before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Returns the bytes of passes in layer-major order: of what all layers are given, and of one layer or the loss.

    The engine is not attached, before and after. No gradients are left.
    """
    weights = StashedWeights(engine.own_parameters)
    works, world, of_pass, of_step = _works(reader, device), World(device=device), [], []
    engine.attach(device, order, weights)
    try:
        with undisturbed(engine.model):
            engine.work(works[:1], world, untimed, lambda _: None)
            for work in works:
                parts = _Parts(live_bytes(device))
                engine.work([work], world, parts.watched, lambda _: None, inside=parts.inside)
                of_pass.append((work.divisor, parts.most))
                of_step.append((work.divisor, parts.kept))
            _drop_gradients(engine.model)
    finally:
        weights.close()
        engine.detach()
    return TokenBytes(per_pass=_slope(of_pass), per_step=_slope(of_step))


class _Parts:
    """Watches what each part of a pass adds to what was there when it began."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self.most = self.kept = 0
        """Bytes of the part that adds most, and of what is there when the backward through the layers begins."""
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
