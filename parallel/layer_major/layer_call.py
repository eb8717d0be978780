"""One call of a layer by one pass: cut off from what follows, and run without a graph to be computed again in the
backward, or with one that waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from heteromesh.errors import UserError
from heteromesh.parallel.layer_major.arguments import (
    PLAIN,
    WAY_OUT,
    Flat,
    MappingChange,
    flattened,
    lists_in,
    mappings_in,
)
from heteromesh.parallel.layer_major.cut import cut_off
from heteromesh.parallel.layer_major.held_hooks import HeldHooks
from heteromesh.parallel.layer_major.kept import weights_by_name
from heteromesh.parallel.layer_major.thread_state import Autocast, OwnGenerators
from heteromesh.parallel.model.draws import active_draws
from heteromesh.parallel.model.offload import ActivationOffload
from heteromesh.parallel.model.recompute import known_in_backward
from heteromesh.parallel.model.undisturbed import state_kept


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer of the model, and what it does when a pass calls it."""

    index: int
    name: str
    module: nn.Module
    forward: Callable[..., Any]
    observed: tuple[nn.Module, ...]
    """The modules whose hooks are held back while it runs."""

    @property
    def trains(self) -> bool:
        """Whether any of its parameters needs a gradient."""
        return any(p.requires_grad for p in self.module.parameters())


class _Outcome(NamedTuple):
    """What a layer has given: its values, changes of mappings, and calls that hooks have missed."""

    returned: Any
    changes: list[MappingChange]
    calls: list[Any]


InputGradient = tuple[GradientEdge, torch.Tensor]


class LayerCall:
    """A call and what is kept of it: its inputs, where their gradients go, and what was as it was then.

    Made in the pass's thread, and finished there by `outputs`; `run` and `backward` are the scheduler's.
    """

    def __init__(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> None:
        """Raises UserError for arguments that can't be kept."""
        self.layer = layer
        self.position = -1
        """In the order in which layers are called; set when it is run."""
        given = flattened((args, kwargs), layer.name, "is given")
        self._mappings = list(mappings_in((args, list(kwargs.values()))))
        self._given, self._device = given._replace(leaves=[]), device
        grad = torch.is_grad_enabled()
        self._wanted = [grad and isinstance(v, torch.Tensor) and v.requires_grad for v in given.leaves]
        self._edges = [get_gradient_edge(v) if w else None for v, w in zip(given.leaves, self._wanted, strict=True)]
        self._inputs = [v.detach() if isinstance(v, torch.Tensor) else v for v in given.leaves]
        self._versions = [_version(v) for v in self._inputs]
        self.needs_gradient = grad and (layer.trains or any(self._wanted))
        self._context, self._autocast = copy_context(), Autocast.current(device)
        draws = active_draws()
        self._draws = draws.again() if draws is not None else None
        self._generators: OwnGenerators | None = None
        self._offload: ActivationOffload | None = None
        self._spec: Any = None
        self._flat: Flat | None = None
        self._held: HeldHooks | None = None
        self._gradients: dict[int, torch.Tensor] = {}
        self._first: list[torch.Tensor] = []
        """What the first run gave, where the second is to be compared with it."""
        self._graph: tuple[list[Any], list[torch.Tensor]] | None = None
        """Inputs and outputs of the graph that waits for the backward."""

    def run(
        self,
        generators: OwnGenerators,
        offload: ActivationOffload | None = None,
        *,
        compared: bool = False,
        keep: bool = False,
    ) -> None:
        """Runs the layer with the pass's random generators.

        offload: sends inputs that are kept to host memory. compared: with what comes of it when the layer is computed
        again. keep: keeps the layer's activations for the backward, so that it need not be.
        """
        self._generators = OwnGenerators(self._device)
        self._generators.states = generators.states
        keep = keep and self.needs_gradient and not compared
        with generators.active():
            self._flat, self._held = self._context.copy().run(self._run_kept if keep else self._run_bare)
        self._spec = self._flat.spec
        self._check_inputs("changes its inputs in place")
        if offload is not None and self.needs_gradient and not keep:
            self._offload = offload
            self._inputs = [offload.pack(v) if isinstance(v, torch.Tensor) else v for v in self._inputs]
        if compared:
            self._first = [t.clone() for t in _tensors(self._flat.leaves)]

    def _run_bare(self) -> tuple[Flat, HeldHooks]:
        with torch.no_grad():
            return self._execute(self._inputs)

    def _run_kept(self) -> tuple[Flat, HeldHooks]:
        inputs = self._differentiable(self._inputs)
        with torch.enable_grad(), weights_by_name(self.layer.module, self.layer.name):
            flat, held = self._execute(inputs)
        self._graph = inputs, _tensors(flat.leaves)
        return flat, held

    def outputs(self) -> Any:
        """Returns what the layer gave, in the pass's graph; makes its changes of mappings, and calls hooks."""
        flat, held, self._flat, self._held = self._flat, self._held, None, None
        assert flat is not None
        assert held is not None
        leaves = list(flat.leaves)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if self.needs_gradient and places:
            for place, tensor in zip(places, cut_off([leaves[i] for i in places], self), strict=True):
                leaves[place] = tensor
        outcome: _Outcome = flat.tree(leaves)
        for mapping, change in zip(self._mappings, outcome.changes, strict=True):
            change.apply(mapping)
        self._mappings = []
        held.replay(outcome.calls, self.layer.name)
        return outcome.returned

    def store(self, index: int, gradient: torch.Tensor) -> None:
        """Takes a gradient of the index-th tensor that the layer gave."""
        known = self._gradients.get(index)
        self._gradients[index] = gradient if known is None else known + gradient

    def backward(self) -> list[InputGradient]:
        """Backpropagates what is stored, through the layer computed again where its graph was not kept; returns its
        inputs' gradients and drops all."""
        found: list[InputGradient] = []
        if self._gradients:
            assert self._generators is not None
            if self._offload is None:
                self._check_inputs("is given something that is changed in place afterwards")
            with self._generators.active(), state_kept(self.layer.module):
                found = self._context.copy().run(self._again if self._graph is None else self._through)
        self._inputs, self._edges, self._gradients, self._first, self._graph = [], [], {}, [], None
        return found

    def _again(self) -> list[InputGradient]:
        inputs = self._differentiable(self._kept())
        with self._draws.active() if self._draws is not None else _nothing(), torch.enable_grad():
            flat, _ = self._execute(inputs)
            self._compare(flat)
            self._graph = inputs, _tensors(flat.leaves)
            return self._through()

    def _through(self) -> list[InputGradient]:
        assert self._graph is not None
        inputs, tensors = self._graph
        pairs = [(tensors[i], g) for i, g in self._gradients.items() if tensors[i].requires_grad]
        if pairs:
            with known_in_backward(pairs[0][0]):
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        return [(e, v.grad) for e, v in zip(self._edges, inputs, strict=True) if e is not None and v.grad is not None]

    def _differentiable(self, inputs: Sequence[Any]) -> list[Any]:
        """Returns the inputs as the beginning of a graph."""
        return [v.detach().requires_grad_() if w else v for v, w in zip(inputs, self._wanted, strict=True)]

    def _execute(self, inputs: Sequence[Any]) -> tuple[Flat, HeldHooks]:
        args, kwargs = self._given.tree(inputs)
        values = args, list(kwargs.values())
        mappings, lists = list(mappings_in(values)), list(lists_in(values))
        before, elements = [dict(m) for m in mappings], [list(each) for each in lists]
        held = HeldHooks()
        with self._autocast.active(), held.of(self.layer.observed):
            returned = self.layer.forward(*args, **kwargs)
        if any(
            len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))
            for a, b in zip(lists, elements, strict=True)
        ):
            raise UserError(
                f"layer {self.layer.name} changes a list that it is given: have it return what is new, or {WAY_OUT}"
            )
        changes = [MappingChange.between(b, m) for b, m in zip(before, mappings, strict=True)]
        return flattened(_Outcome(returned, changes, held.calls), self.layer.name, "gives back"), held

    def _kept(self) -> list[Any]:
        """Returns the inputs, on their device."""
        if self._offload is None:
            return self._inputs
        return [v if isinstance(v, PLAIN) else self._offload.unpack(v) for v in self._inputs]

    def _check_inputs(self, what: str) -> None:
        if self._versions != [_version(v) for v in self._inputs]:
            raise UserError(
                f"layer {self.layer.name} {what}, so that it can't be computed again in the backward: have it make a "
                f"new tensor, or {WAY_OUT}"
            )

    def _compare(self, flat: Flat) -> None:
        """Raises UserError where the layer gives something else than at first."""
        other = flat.spec != self._spec
        for first, again in zip(self._first, [] if other else _tensors(flat.leaves), strict=False):
            other = other or _differs(first, again.detach())
        if other:
            raise UserError(
                f"layer {self.layer.name} ({type(self.layer.module).__name__}) gives something else for the same "
                "inputs when it is computed again, so it depends on something beside them: give it what it depends on "
                f"as an argument, or {WAY_OUT}"
            )


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _differs(first: torch.Tensor, again: torch.Tensor) -> bool:
    if first.shape != again.shape or first.dtype != again.dtype:
        return True
    if not first.is_floating_point():
        return not torch.equal(first, again)
    # sums whose order the device chooses may differ in their last bits
    scale = float(first.abs().max()) if first.numel() else 0.0
    return not torch.allclose(first.double(), again.double(), rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
