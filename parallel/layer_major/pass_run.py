"""One pass on its way through the layers: where it waits, and the gradients that are on their way back."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from heteromesh.parallel.layer_major.baton import PassThread
from heteromesh.parallel.layer_major.cut import owner_of
from heteromesh.parallel.layer_major.layer_call import LayerCall
from heteromesh.parallel.layer_major.stubs import LayerStubs
from heteromesh.parallel.model.offload import ActivationOffload
from heteromesh.parallel.model.recompute import known_in_backward

BOTTOM = -1
"""Where gradients go last that don't come from any layer: embeddings, and tensors that all layers are given."""


class Head(NamedTuple):
    """What a pass's forward comes to."""

    loss: torch.Tensor
    """What is to be backpropagated."""
    context: Context
    """In which the pass is active."""


class PassBody(NamedTuple):
    """A pass to be run."""

    forward: Callable[[], Head]
    offload: ActivationOffload | None = None
    """Where what layers are given is kept; None: where it is."""
    alone: bool = True
    """Whether no other rank has to compute a layer again when this one does."""


class _Pending(NamedTuple):
    """A gradient that waits for the layer behind it."""

    edge: GradientEdge
    gradient: torch.Tensor


class PassRun:
    """A pass in layer-major order. Positions are those of the order in which layers are called."""

    def __init__(self, body: PassBody, stubs: LayerStubs, device: torch.device) -> None:
        self._thread: PassThread[Head] = PassThread(body.forward, device)
        self._stubs, self._offload, self._alone = stubs, body.offload, body.alone
        self.waiting: LayerCall | None = None
        """The call that the pass waits for."""
        self._calls: dict[int, LayerCall] = {}
        self._context: Context | None = None
        self._pending: dict[int, dict[tuple[Any, int], _Pending]] = {}
        """By position of the last layer before it, and by node and output."""
        self._positions: dict[Any, int] = {}
        """Of nodes of the graph, the position of the last layer before them."""

    def resume(self) -> None:
        """Goes on to the next layer or to the end; there the pass's loss is backpropagated to the layers' outputs."""
        self.waiting = self._thread.resume()
        if self.waiting is None:
            head, self._thread.result = self._thread.result, None
            assert head is not None
            self._context = head.context
            if self._offload is not None:
                self._offload.seen.clear()  # what is kept is kept by the calls
            # parts of the graph are needed again, for gradients that layers send to what lies between them
            head.context.copy().run(_backpropagate, head.loss)

    def run_layer(self, position: int, *, compared: bool, keep: bool) -> bool:
        """Runs the layer that the pass waits for; returns whether there will be anything to do in the backward.

        compared, keep: see `LayerCall.run`; a pass of several ranks keeps nothing, as not all of them may have room.
        """
        call = self.waiting
        assert call is not None
        with self._stubs.inside(call.layer):
            call.run(self._thread.generators, self._offload, compared=compared, keep=keep and self._alone)
        if call.needs_gradient:
            self._calls[position] = call
            call.position = position
        return call.needs_gradient

    def backward(self, position: int) -> None:
        """Backpropagates through what follows a layer, then through the layer."""
        self._flush(position, last=False)
        call = self._calls.pop(position, None)
        if call is None:
            return
        with self._stubs.inside(call.layer):
            found = call.backward()
        for edge, gradient in found:
            self._add(edge, gradient)

    def finish(self) -> None:
        """Backpropagates through what comes before all layers."""
        self._flush(BOTTOM, last=True)
        self._positions.clear()

    def abandon(self) -> None:
        """Ends a pass that is not gone on with."""
        self._thread.abandon()

    def _add(self, edge: GradientEdge, gradient: torch.Tensor) -> None:
        owner = owner_of(edge.node)
        if owner is not None:
            owner.store(edge.output_nr, gradient)
            return
        waiting = self._pending.setdefault(self._position(edge.node), {})
        known = waiting.get((edge.node, edge.output_nr))
        waiting[edge.node, edge.output_nr] = _Pending(edge, gradient if known is None else known.gradient + gradient)

    def _flush(self, position: int, *, last: bool) -> None:
        pending = list(self._pending.pop(position, {}).values())
        if pending:
            assert self._context is not None
            edges, gradients = [p.edge for p in pending], [p.gradient for p in pending]
            # in one backward, as they may share a part of the graph
            self._context.copy().run(torch.autograd.backward, edges, gradients, retain_graph=not last)

    def _position(self, node: Any) -> int:
        """Returns the position of the last layer that a node's value depends on."""
        stack = [node]
        while stack:
            top = stack[-1]
            owner = owner_of(top)
            if owner is not None:
                self._positions[top] = owner.position
            elif top not in self._positions:
                before = [n for n, _ in top.next_functions if n is not None]
                unknown = [n for n in before if n not in self._positions]
                if unknown:
                    stack += unknown
                    continue
                self._positions[top] = max((self._positions[n] for n in before), default=BOTTOM)
            stack.pop()
        return self._positions[node]


def _backpropagate(loss: torch.Tensor) -> None:
    with known_in_backward(loss):
        loss.backward(retain_graph=True)
