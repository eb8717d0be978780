"""Which weights of layers can be held in autocast's dtype: those that it casts anyway, tried on the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.parallel.initial.stand_ins import GradientSketches
from heteromesh.parallel.layer_major.casts import CastNotes
from heteromesh.parallel.layer_major.schedule import LayerOrder
from heteromesh.parallel.layer_major.weights import StashedWeights
from heteromesh.parallel.model.call import eagerly
from heteromesh.parallel.model.undisturbed import gradients_kept, undisturbed
from heteromesh.runtime.engine.layer_major import LayerMajor, PassWork, untimed

_NOISE = 4.0
"""Times the difference of two runs with the same weights: kernels of some devices add up in changing order."""

Watch = Callable[[Sequence[nn.Parameter]], None]
Found = list[torch.Tensor]
"""The losses, and the gradients of all parameters that have one."""


def try_working_weights(
    engine: LayerMajor,
    work: PassWork,
    order: LayerOrder,
    device: torch.device,
    sketches: GradientSketches | None = None,
) -> tuple[nn.Parameter, ...]:
    """Returns the parameters of layers with which, in the engine's autocast dtype, a pass has the same numbers.

    The engine is not attached, before and after; the model is as it was. Where the numbers of a pass differ (code that
    asks a weight for its dtype), frozen weights alone are tried, then there are none, as where the trial itself fails.
    sketches: of the gradients of a model that has stand-ins for its weights; these are compared then.
    """
    assert engine.autocast is not None
    assert engine.forwards == 1, "what is put back afterwards would include layers that recompute"
    notes = CastNotes(engine.autocast)

    def numbers(some: Collection[nn.Parameter] = (), watch: Watch = lambda _: None) -> Found | None:
        try:
            return _numbers(engine, work, order, device, _TrialWeights(engine, some, watch), sketches)
        except Exception:  # operands of two dtypes, kernels that no mode may look at: nothing that training must know
            return None

    with eagerly(engine.model), gradients_kept(engine.model):
        with notes:
            seen = numbers(watch=notes.watch)
        found = tuple(p for p in engine.model.parameters() if seen and p in notes.only_cast)
        frozen = tuple(p for p in found if not p.requires_grad)
        expected = numbers() if found else None
        noise = _off(expected, numbers())
        tried = (some for some in dict.fromkeys((found, frozen)) if _off(expected, numbers(some)) <= _NOISE * noise)
        return next(tried, ()) if math.isfinite(noise) else ()


class _TrialWeights(StashedWeights):
    """Weights that are all here, in a layer's parameters only while it runs; some of them in 16 bit."""

    def __init__(self, engine: LayerMajor, working: Collection[nn.Parameter], watch: Watch) -> None:
        super().__init__(engine.own_parameters)
        self._own, self._dtype, self._watch = engine.own_parameters, engine.autocast, watch
        self._working = set(working)

    def show(self, layer: int) -> None:
        super().show(layer)
        for parameter in self._own[layer]:
            if parameter in self._working:
                parameter.data = parameter.data.to(self._dtype)
        self._watch(self._own[layer])

    def close(self) -> None:
        self._working.clear()
        super().close()
        self._watch(())


def _numbers(
    engine: LayerMajor,
    work: PassWork,
    order: LayerOrder,
    device: torch.device,
    weights: _TrialWeights,
    sketches: GradientSketches | None,
) -> Found:
    """Returns what a pass comes to with these weights, which are closed then."""
    with undisturbed(engine.model), sketches.kept() if sketches is not None else nullcontext():
        engine.attach(device, order, weights)
        try:
            made = engine.work([work], World(device=device), untimed, lambda _: None)
            taken = sketches.take() if sketches is not None else {p: p.grad for p in engine.model.parameters()}
            gradients = [g.float() for p in engine.model.parameters() if (g := taken.get(p)) is not None]
        finally:
            weights.close()
            engine.detach()
            for parameter in engine.model.parameters():
                parameter.grad = None
    return [made[0].losses, *gradients]


def _off(one: Found | None, other: Found | None) -> float:
    """Returns how far numbers are apart, relative to each tensor's largest; 0.0 only where all are equal."""
    if one is None or other is None or [t.shape for t in one] != [t.shape for t in other]:
        return math.inf
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if not torch.equal(a, b)]
    return max((float((a - b).abs().max()) / (float(a.abs().max()) or 1.0) for a, b in pairs), default=0.0)
