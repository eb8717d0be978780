"""Whether a model can be trained layer by layer: its gradients compared with those of ordinary passes, on itself.

Equal losses prove nothing: a value that leaves a layer another way than as its output (a hook, an attribute, a cache)
has the right value and no gradient. So before the first step a few dozen tokens go through the model in both orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.initial.stand_ins import GradientSketches
from heteromesh.parallel.layer_major.arguments import WAY_OUT, mappings_in
from heteromesh.parallel.layer_major.schedule import LayerOrder
from heteromesh.parallel.layer_major.weights import StashedWeights
from heteromesh.parallel.model.call import plain_name
from heteromesh.parallel.model.self_check import exactly
from heteromesh.parallel.model.undisturbed import gradients_kept, modes_kept, undisturbed
from heteromesh.runtime.engine.layer_major import LayerMajor, PassWork, sample_work, untimed
from heteromesh.runtime.engine.working_trial import try_working_weights
from heteromesh.runtime.work.reader import Reader

_SIZES = (13, 9)
"""Tokens of the passes, at most."""
_ALLOWED = 3e-4
"""Relative difference of a parameter's gradient, in float32: sums in another order were off by a hundredth of it."""
_SMALL = 1e-3
"""Of the model's largest gradient, below which a parameter's own counts as this much."""

Gradients = dict[nn.Parameter, torch.Tensor]


def try_layers(
    engine: LayerMajor, reader: Reader, device: torch.device, sketches: GradientSketches | None = None
) -> LayerOrder:
    """Returns the order in which the model calls its layers, where gradients are those of ordinary passes.

    sketches: of the gradients of a model that has stand-ins for its weights; these are compared then.
    The engine is not attached, before and after; the model is as it was. Raises UserError where gradients differ,
    naming the layer, and where the model can't be run layer by layer.
    """
    model = engine.model
    works = trial_works(reader, device)
    autocast, engine.autocast = engine.autocast, None  # of rounding in halves nothing could be told
    try:
        with undisturbed(model), exactly(model), gradients_kept(model), _sketched(sketches):
            with _calls_noted(engine.layers) as (calls, mappings):
                expected = _pass_by_pass(engine, works, device, sketches)
            with modes_kept(model), torch.no_grad(), _calls_noted(engine.layers) as (evaluated, _):
                # layers that are skipped at random in training are called here
                model.eval()
                engine.forward_only(works[0], World(device=device))
            order = _order(engine, max(calls[: len(calls) // len(works)], evaluated, key=len))
            found, first = _layer_by_layer(engine, works, order, device, sketches)
    finally:
        engine.autocast = autocast
    _compare(engine, expected, found)
    return replace(order, first_backward=first, mappings=bool(mappings))


def trial_works(reader: Reader, device: torch.device) -> list[PassWork]:
    """Returns passes of a few tokens of the data, to be tried on one device."""
    counts = [min(size, max(reader.lengths)) for size in _SIZES]
    return [sample_work(reader, device, count, sum(_SIZES), place) for place, count in enumerate(counts)]


def working_weights(
    engine: LayerMajor,
    reader: Reader,
    device: torch.device,
    order: LayerOrder,
    sketches: GradientSketches | None = None,
) -> list[int]:
    """Returns which of the model's parameters are gathered in the dtype to which autocast casts them anyway."""
    numbers = {p: i for i, p in enumerate(engine.model.parameters())}
    work = trial_works(reader, device)[0]
    return [numbers[p] for p in try_working_weights(engine, work, order, device, sketches)]


def layer_reducer(
    engine: LayerMajor, order: LayerOrder, working: Mapping[nn.Parameter, torch.dtype], *, scatter: bool
) -> GradientReducer:
    """Returns a sum of gradients layer by layer, the last one first, as a backward goes."""
    last_first = dict.fromkeys(reversed(order.layers))
    rest = [index for index in range(len(engine.layers)) if index not in last_first]
    groups = [engine.own_parameters[index] for index in (*last_first, *rest)]
    return GradientReducer(engine.model.parameters(), scatter=scatter, groups=groups, working=working)


def _pass_by_pass(
    engine: LayerMajor, works: list[PassWork], device: torch.device, sketches: GradientSketches | None
) -> Gradients:
    world = World(device=device)
    for work in works:
        engine.forward_backward(work.context, work.batch, work.divisor, world, 0.0, work.number, work.places)
    return _taken(engine.model, sketches)


def _layer_by_layer(
    engine: LayerMajor,
    works: list[PassWork],
    order: LayerOrder,
    device: torch.device,
    sketches: GradientSketches | None,
) -> tuple[Gradients, int]:
    weights = StashedWeights(engine.own_parameters)
    engine.attach(device, order, weights)
    try:
        engine.work(works, World(device=device), untimed, lambda _: None, compared=True)
        first = _first_backward(engine, order)
    except UserError:
        raise
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{type(engine.model).__name__} fails when its layers are run one by one for all passes, each with its "
            f"weights there only while it runs ({type(error).__name__}: {line}): let only a layer itself use its "
            f"weights, or {WAY_OUT}"
        ) from error
    finally:
        weights.close()
        engine.detach()
    return _taken(engine.model, sketches), first


def _order(engine: LayerMajor, calls: list[int]) -> LayerOrder:
    if not calls:
        raise UserError(
            f"{type(engine.model).__name__} calls none of the layers in its module lists by itself: call them, or "
            f"{WAY_OUT}"
        )
    return LayerOrder(layers=tuple(calls))


def _first_backward(engine: LayerMajor, order: LayerOrder) -> int:
    """Returns the first position with anything to do in the backward: as seen, or that of a trained layer."""
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in engine.layers.values()]
    return next((i for i, layer in enumerate(order.layers) if trained[layer] or i == engine.first_backward), 0)


def _compare(engine: LayerMajor, expected: Gradients, found: Gradients) -> None:
    most = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    wrong: dict[str, float] = {}
    for name, parameter in engine.model.named_parameters():
        one, other = expected.get(parameter), found.get(parameter)
        if one is None and other is None:
            continue
        if one is None:
            assert other is not None
            one = torch.zeros_like(other)
        other = torch.zeros_like(one) if other is None else other
        scale = max(float(one.abs().max()), _SMALL * most) if one.numel() else 1.0
        off = float((one - other).abs().max()) / (scale or 1.0) if one.numel() else 0.0
        if off > _ALLOWED or off != off:
            wrong[plain_name(name)] = off
    if wrong:
        # a backward goes from the end: what is off in the last layer does not come from others
        layers = [next((n for n in engine.layers if name.startswith(f"{n}.")), "") for name in wrong]
        last = max((n for n in layers if n), key=list(engine.layers).index, default="")
        name = next(n for n, layer in zip(wrong, layers, strict=True) if layer == last)
        where = f"layer {last}" if last else "what is outside its layers"
        raise UserError(
            f"{type(engine.model).__name__} gets other gradients when its layers are run one by one for all passes, "
            f"off by {wrong[name]:.2g} (relative) at {name}: {where} depends on something beside what it is given, or "
            f"hands something on beside what it returns; make these arguments and outputs, or {WAY_OUT}"
        )


def _sketched(sketches: GradientSketches | None) -> AbstractContextManager[None]:
    return sketches.kept() if sketches is not None else nullcontext()


def _taken(model: nn.Module, sketches: GradientSketches | None) -> Gradients:
    """Returns the gradients, or their sketches, and takes them off the parameters."""
    if sketches is not None:
        return sketches.take()
    found = {p: p.grad.detach().clone() for p in model.parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


@contextmanager
def _calls_noted(layers: Mapping[str, nn.Module]) -> Iterator[tuple[list[int], list[int]]]:
    """Notes which layers are called within the block, and which of them are given mappings; by index, in order."""
    calls: list[int] = []
    mappings: list[int] = []

    def noting(index: int) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(index)
            mappings.extend(index for _ in mappings_in((args, list(kwargs.values()))))

        return note

    hooks = [
        layer.register_forward_pre_hook(noting(index), with_kwargs=True) for index, layer in enumerate(layers.values())
    ]
    try:
        yield calls, mappings
    finally:
        for hook in hooks:
            hook.remove()
