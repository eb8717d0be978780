"""What a rank of a running job holds, by kind, from the model's real sizes: as many bytes as it has, layer by layer.

With sharded weights what a rank holds changes in the course of a step, and its largest moment counts:

    head          all layers' inputs of its passes, the loss of one pass, gradients of what is outside layers
    back at i     layers i and i - 1 gathered; inputs up to layer i; layer i of one pass computed again; its gradients,
                  those of layer i + 1 on their way to their owners, and its own part of the later ones
    end           gradients of the first layer and of what is outside layers on their way, and its own part of all
    update        its part of gradients, and what the optimizer makes of it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes


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


def replicated_in_job(
    model: JobModel, rank: JobRank, *, optimizer: float, pass_bytes: float, ranks: int, copied: bool = False
) -> MemoryByKind:
    """Returns what a rank holds at the most where weights are whole on it.

    optimizer: its fraction of the state. pass_bytes: activations of its largest pass. copied: whether checkpoints are
    copies of weights and state. Gradients are kept from step to step, but where each rank has its part of their sum.
    """
    in_flight = min(model.whole_trained, 2 * model.largest) * (1 + optimizer * rank.senders) if ranks > 1 else 0.0
    state = optimizer * model.state * model.whole_trained
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

    resident: how many layers stay gathered, the last ones.
    """
    moments = _Moments(model, rank, fraction, resident)
    every = moments.of_step(tokens.per_pass * of_pass, tokens.per_step * of_step)
    return max(every, key=lambda memory: memory.total)


@dataclass(frozen=True, slots=True)
class _Moments:
    """The moments of a step on a rank."""

    model: JobModel
    rank: JobRank
    fraction: float
    resident: int

    def of_step(self, activations: float, inputs: float) -> Iterator[MemoryByKind]:
        """Yields them in their order. inputs: of all layers together."""
        model, base, count = self.model, self._base(), len(self.model.layers)
        outside = model.outside_trained
        yield replace(
            base,
            gradients=outside + min(model.largest, outside),
            gather_buffers=self._gathered(count - 1),
            activations=activations,
            layer_inputs=inputs,
        )
        for i in range(count - 1, -1, -1):
            yield from self._backward(i, base, activations, inputs)
        first = model.trained[0] if count else 0.0
        yield replace(
            base,
            gradients=self.fraction * sum(model.trained[1:]) + min(model.largest, outside),
            collective_buffers=self._under_way(outside + first),
        )
        # an element-wise update makes a few temporaries of one parameter's part
        yield replace(base, gradients=self.fraction * (model.whole_trained + 2 * model.largest))

    def _base(self) -> MemoryByKind:
        """Returns what is there throughout."""
        model, count = self.model, len(self.model.layers)
        dropped = count - self.resident
        kept = sum(model.gathered_bytes(i) for i in range(dropped, count)) + model.outside_here
        return MemoryByKind(
            # of what is kept, the own part is a part, but for what owners keep in another precision
            weights=kept + self.fraction * (sum(model.layers[:dropped]) - sum(model.apart[:dropped])),
            masters=self.fraction * (sum(model.apart) + model.outside_apart),
            moments=self.fraction * model.state * model.whole_trained,
            context=self.rank.context,
        )

    def _backward(self, i: int, base: MemoryByKind, activations: float, inputs: float) -> Iterator[MemoryByKind]:
        """Yields the backward of a layer: while it is computed, and when its gradients have been given away."""
        trained, count = self.model.trained, len(self.model.layers)
        following = trained[i + 1] if i + 1 < count else 0.0
        own = self.fraction * sum(trained[i + 2 :])
        done = replace(base, gradients=self.model.outside_trained + trained[i] + own)
        yield replace(
            done,
            gather_buffers=self._gathered(i, i - 1),
            collective_buffers=self._under_way(following),
            activations=activations,
            # those of the layers up to this one, and the gradients of what it has given
            layer_inputs=inputs * (i + 2) / (count + 1),
        )
        yield replace(
            done,
            gather_buffers=self._gathered(i - 1),
            collective_buffers=self._under_way(following) + self.fraction * self.rank.senders * trained[i],
            layer_inputs=inputs * (i + 1) / (count + 1),
        )

    def _gathered(self, *positions: int) -> float:
        """Returns the bytes of those of these layers that don't stay."""
        dropped = len(self.model.layers) - self.resident
        return float(sum(self.model.gathered_bytes(i) for i in positions if 0 <= i < dropped))

    def _under_way(self, size: float) -> float:
        """Returns the bytes of gradients that are being summed: this rank's, and the others' of what it owns."""
        return size * (1 + self.fraction * self.rank.senders)
