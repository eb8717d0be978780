"""What a rank of a running job holds, by kind, from the model's real sizes: as many bytes as it has, layer by layer.

With sharded weights what a rank holds changes in the course of a step, and its largest moment counts:

    head          all layers' inputs of its passes, kept activations, the loss of one pass, gradients of what is outside
                  layers
    back at i     layers i and i - 1 gathered; inputs and kept activations up to layer i; layer i of one pass computed
                  again; its gradients, those of layer i + 1 on their way to their owners, and its own part of the later
                  ones
    end           gradients of the first layer and of what is outside layers on their way, and its own part of all
    update        its part of gradients, and what the optimizer makes of it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from heteromesh.planner.ownership.memory import KINDS, MemoryByKind, TokenBytes
from heteromesh.planner.solver import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class JobModel:
    """A model's bytes as their owners hold them; layers in the order in which passes go through them."""

    layers: tuple[float, ...]
    """By layer, of the weights that are its alone."""
    trained: tuple[float, ...]
    """Of these, those that get gradients."""
    outside: float
    """Of weights outside layers."""
    outside_trained: float
    largest: float
    """Of the largest parameter: its gradient exists twice while it is added."""
    state: float
    """Bytes of optimizer state for each byte of trained weights."""
    gathered: tuple[float, ...] = ()
    """By layer, of its weights where it is gathered; empty: as at their owners."""
    apart: tuple[float, ...] = ()
    """By layer, of weights that owners keep beside those gathered, in another precision; empty: none."""
    outside_gathered: float | None = None
    """Of weights outside layers where they are gathered; None: as at their owners."""
    outside_apart: float = 0.0
    """Of weights outside layers that owners keep beside them."""
    granule: float = 0.0
    """Of the largest weight that has one owner, by which a rank may own more than its fraction; 0: there are none."""

    @property
    def outside_here(self) -> float:
        """Bytes of what is outside layers, which every rank has."""
        return self.outside if self.outside_gathered is None else self.outside_gathered

    def gathered_bytes(self, position: int) -> float:
        """Returns the bytes of a layer that is gathered."""
        return self.gathered[position] if self.gathered else self.layers[position]

    @property
    def whole(self) -> float:
        """Bytes of all weights."""
        return sum(self.layers) + self.outside

    @property
    def whole_trained(self) -> float:
        """Bytes of all weights that get gradients."""
        return sum(self.trained) + self.outside_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRank:
    """A rank's memory."""

    memory: float
    """Bytes that the process may use; infinite: not known."""
    context: float
    """Bytes that it holds anyway."""
    speed: float = 1.0
    device: str = ""
    """What people call it."""
    senders: int = 1
    """Other ranks or hosts whose contributions to what it owns it receives, each into a buffer."""
    in_memory: float = 1.0
    """Of the optimizer's state that it owns, what its memory has at the most; the rest is on lower tiers."""


def replicated_in_job(
    model: JobModel, rank: JobRank, *, optimizer: float, pass_bytes: float, ranks: int, copied: bool = False
) -> MemoryByKind:
    """Returns what a rank holds at the most where weights are whole on it.

    optimizer: its fraction of the state. pass_bytes: activations of its largest pass. copied: whether checkpoints are
    copies of weights and state. Gradients are kept from step to step, but where each rank has its part of their sum.
    """
    in_flight = min(model.whole_trained, 2 * model.largest) * (1 + optimizer * rank.senders) if ranks > 1 else 0.0
    state = rank.in_memory * optimizer * model.state * model.whole_trained
    base = MemoryByKind(weights=model.whole, moments=state, context=rank.context)
    works = replace(base, gradients=model.whole_trained, activations=pass_bytes, collective_buffers=in_flight)
    kept = model.whole_trained if optimizer == 1 and ranks > 1 else 0.0
    saves = replace(base, gradients=kept, copies=(model.whole + state) * copied)
    return max(works, saves, key=lambda memory: memory.total)


def sharded_in_job(
    model: JobModel,
    rank: JobRank,
    fraction: float,
    resident: int,
    tokens: TokenBytes,
    *,
    of_pass: float,
    of_step: float,
) -> MemoryByKind:
    """Returns what a rank of sharded weights holds at the moment of a step at which that is most.

    resident: how many layers stay gathered, the last ones. `kept_layers` says whose activations are kept.
    """
    return StepMoments(model, rank, resident).largest(fraction, *_token_sizes(tokens, of_pass, of_step))


def kept_layers(
    model: JobModel,
    rank: JobRank,
    fraction: float,
    resident: int,
    tokens: TokenBytes,
    *,
    of_pass: float,
    of_step: float,
) -> int:
    """Returns of how many layers, the last ones, activations of all of the rank's tokens of a step fit beside the rest;
    none where memory is not known."""
    return StepMoments(model, rank, resident).most_kept(fraction, *_token_sizes(tokens, of_pass, of_step))


def _token_sizes(tokens: TokenBytes, of_pass: float, of_step: float) -> tuple[float, float, list[float]]:
    """Returns bytes of the largest pass's activations, of all layers' inputs, and by layer of kept activations."""
    return tokens.per_pass * of_pass, tokens.per_step * of_step, [each * of_step for each in tokens.by_layer]


class StepMoments:
    """The moments of a step on a rank that keeps some layers.

    What it holds at each is a constant, plus so much for the fraction that it owns, and shares of the activations of
    its largest pass and of the inputs of all layers: so the most of each that fits follows by a division.
    """

    def __init__(self, model: JobModel, rank: JobRank, resident: int) -> None:
        self._memory = rank.memory
        count, dropped = len(model.layers), len(model.layers) - resident
        self._constant = {kind: np.zeros(2 * count + 3) for kind in KINDS}
        self._per_fraction = {kind: np.zeros(2 * count + 3) for kind in KINDS}
        self._activations, self._inputs = np.zeros(2 * count + 3), np.zeros(2 * count + 3)
        self._owner = np.zeros(2 * count + 3)
        """Of gradients, what a rank holds that owns anything, however much."""
        self._throughout(model, rank, dropped)
        self._gradients(model, rank.senders)
        self._gathered(model, dropped)
        self._tokens(count)

    def largest(self, fraction: float, activations: float, inputs: float, by_layer: Sequence[float]) -> MemoryByKind:
        """Returns the memory at the moment at which it is most.

        Bytes of activations of the largest pass, of all layers' inputs, and by layer of activations, which as many
        layers keep as `most_kept` says.
        """
        kept = self.most_kept(fraction, activations, inputs, by_layer)
        working = activations * self._activations + self._kept(by_layer, kept)
        held = self._held(fraction) + working + inputs * self._inputs
        at = int(held.argmax())
        kinds = {k: float(self._constant[k][at] + fraction * self._per_fraction[k][at]) for k in KINDS}
        kinds["gradients"] += float(self._owner[at]) * (fraction > 0)
        kinds["activations"] = float(working[at])
        kinds["layer_inputs"] = float(inputs * self._inputs[at])
        return MemoryByKind(**kinds)

    def most_fraction(self, activations: float, inputs: float, spare: float = 0.0) -> float:
        """Returns the largest fraction that fits with `spare` more, at most 1; negative where none does."""
        free = self._memory - self._constants - activations * self._activations - inputs * self._inputs
        return -1.0 if free.min() < 0 else min(1.0, max(0.0, _least_ratio(free - self._owner, self._slopes) - spare))

    def most_activations(self, fraction: float, inputs: float) -> float:
        """Returns the most bytes of activations that fit; negative where none do."""
        free = self._memory - self._held(fraction) - inputs * self._inputs
        return -1.0 if free.min() < 0 else _least_ratio(free, self._activations)

    def most_inputs(self, fraction: float, activations: float) -> float:
        """Returns the most bytes of layers' inputs that fit; negative where none do."""
        free = self._memory - self._held(fraction) - activations * self._activations
        return -1.0 if free.min() < 0 else _least_ratio(free, self._inputs)

    def most_kept(self, fraction: float, activations: float, inputs: float, by_layer: Sequence[float]) -> int:
        """Returns of how many layers, the last ones, so many bytes of activations fit; none where memory is unknown."""
        if math.isinf(self._memory):
            return 0
        held = self._held(fraction) + activations * self._activations + inputs * self._inputs
        counts = range(len(by_layer), 0, -1)
        return next((n for n in counts if (held + self._kept(by_layer, n)).max() <= self._memory), 0)

    def _kept(self, by_layer: Sequence[float], kept: int) -> Floats:
        """Returns by moment the bytes of activations that the last layers still keep then."""
        found: Floats = np.zeros(len(self._activations))
        count = len(by_layer)
        if kept:
            sums = np.cumsum([size if i >= count - kept else 0.0 for i, size in enumerate(by_layer)])
            before = np.concatenate(([0.0], sums[:-1]))
            found[0], found[1:-2:2], found[2:-2:2] = sums[-1], sums[::-1], before[::-1]
        return found

    def _held(self, fraction: float) -> Floats:
        """Returns what is held at each moment without tokens."""
        return self._constants + fraction * self._slopes + (fraction > 0) * self._owner

    @cached_property
    def _constants(self) -> Floats:
        summed: Floats = np.sum(list(self._constant.values()), axis=0)
        return summed

    @cached_property
    def _slopes(self) -> Floats:
        summed: Floats = np.sum(list(self._per_fraction.values()), axis=0)
        return summed

    def _throughout(self, model: JobModel, rank: JobRank, dropped: int) -> None:
        kept = sum(model.gathered_bytes(i) for i in range(dropped, len(model.layers))) + model.outside_here
        self._constant["weights"] += kept
        # of what is kept, the own part is a part, but for what owners keep in another precision
        self._per_fraction["weights"] += sum(model.layers[:dropped]) - sum(model.apart[:dropped])
        self._per_fraction["masters"] += sum(model.apart) + model.outside_apart
        self._per_fraction["moments"] += rank.in_memory * model.state * model.whole_trained
        self._constant["context"] += rank.context

    def _gradients(self, model: JobModel, senders: int) -> None:
        """Adds gradients: those of a layer, those of the one after it on their way, the own part of all later ones.

        What is summed is held once here, and the own part of it once more for each other sender.
        """
        outside, trained = model.outside_trained, np.array((*model.trained, 0.0, 0.0))
        own = np.cumsum(trained[::-1])[::-1]
        here, per_fraction = self._constant["gradients"], self._per_fraction["gradients"]
        sent, staged = self._constant["collective_buffers"], self._per_fraction["collective_buffers"]
        here[0] = outside + min(model.largest, outside)
        # the last layer's backward comes first
        layers = np.arange(len(model.layers))[::-1]
        for first in (1, 2):
            here[first:-2:2] = outside + trained[layers]
            per_fraction[first:-2:2] = own[layers + 2]
            sent[first:-2:2] = trained[layers + 1]
            staged[first:-2:2] = senders * trained[layers + 1]
        staged[2:-2:2] += senders * trained[layers]
        here[-2], per_fraction[-2] = min(model.largest, outside), own[1]
        sent[-2] = outside + trained[0]
        staged[-2] = senders * sent[-2]
        # an element-wise update makes a few temporaries of one parameter's part, another one of a whole parameter
        per_fraction[-1] = model.whole_trained + 2 * (model.largest - model.granule)
        self._owner[-1] = 2 * model.granule

    def _gathered(self, model: JobModel, dropped: int) -> None:
        """Adds layers that don't stay: the last one under the head, two under a backward, one after it."""
        count = len(model.layers)
        sizes = np.array([model.gathered_bytes(i) if i < dropped else 0.0 for i in range(count)])
        before = np.concatenate(([0.0], sizes[:-1])) if count else sizes
        buffers = self._constant["gather_buffers"]
        buffers[0] = sizes[-1] if count else 0.0
        buffers[1:-2:2], buffers[2:-2:2] = (sizes + before)[::-1], before[::-1]

    def _tokens(self, count: int) -> None:
        """Adds the shares of inputs that are left: of the layers up to this one, and gradients of what it has given."""
        left = np.arange(count, 0, -1)
        self._activations[0] = self._inputs[0] = 1.0
        self._activations[1:-2:2] = 1.0
        self._inputs[1:-2:2], self._inputs[2:-2:2] = (left + 1) / (count + 1), left / (count + 1)


def _least_ratio(free: Floats, each: Floats) -> float:
    """Returns the largest number of which no moment has too much."""
    grows = each > 0
    return float((free[grows] / each[grows]).min()) if grows.any() else math.inf
