"""The pass-major engine: this rank's passes in list order, each through all layers, forward and backward."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from heteromesh.comm.gradients.exchange import GradientExchange, Share
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext, prepare_pass
from heteromesh.parallel.attention.layout import Segment
from heteromesh.parallel.model.call import IGNORED, ModelCall
from heteromesh.parallel.model.draws import token_places
from heteromesh.parallel.model.layers import outermost_layers
from heteromesh.parallel.model.loss import Loss, LossBatch, PassLosses
from heteromesh.parallel.model.offload import offload
from heteromesh.parallel.model.randomness import PassRandomness
from heteromesh.parallel.model.recompute import keep_activations, known_in_backward, recompute_layers
from heteromesh.parallel.model.rotary import follow_lengths
from heteromesh.planner.plan import Pass
from heteromesh.runtime.engine.api import Measurements, NonFinite, PassMeasure
from heteromesh.runtime.work.reader import PassInput
from heteromesh.runtime.work.source import Assignment


class PassMajor:
    """The `Engine` of ordinary steps.

    `model(input_ids, position_ids)` returns logits (1, n, vocab), as a tensor or in `.logits`; or, if it takes
    `targets`, per-token losses (1, n). `autocast`: a dtype for torch.autocast. `loss`: of the user's own, over the
    outputs (1, n, ...) of a model (docs/losses.md).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        checkpoint_activations: bool = False,
        loss: Loss | None = None,
    ) -> None:
        self._loss = loss
        self.model, self._seed, self.autocast = model, seed, autocast
        self._randomness = PassRandomness(model)
        self._call = ModelCall(model)
        self._rotary = follow_lengths(model)
        self.forwards = 2 if checkpoint_activations else 1
        """How often a layer's forward runs in a pass."""
        self._recomputed = recompute_layers(_layers(model)) if checkpoint_activations else []

    def close(self) -> None:
        self._randomness.close()
        for hook in self._rotary:
            hook.remove()
        keep_activations(self._recomputed)

    def run(self, assignment: Assignment, world: World, exchange: GradientExchange) -> Measurements:
        assert assignment.step is not None
        mine = assignment.step.passes_of(world.rank)
        timer, ran = PassTimer(world), []
        for position, plan in mine:
            members = tuple(world.members[rank] for rank in plan.ranks)
            places = tuple(assignment.places[i] for i in plan.sequences)
            with (
                exchange.share(members, places) as share,
                timer.time(position, f"pass {position} {plan.method} x{len(plan.ranks)}"),
            ):
                if position == mine[-1][0]:
                    exchange.last_backward()
                ran.append(self._pass(assignment, world, plan, position, places, share))
        return measured(timer, ran, world.rank)

    def forward_backward(
        self,
        context: PassContext,
        batch: PassInput,
        divisor: float,
        world: World,
        offload_ratio: float = 0.0,
        number: int = 0,
        places: Sequence[int] = (),
    ) -> PassLosses:
        """Runs one pass without summing gradients; returns losses (n,), detached, 0 where ignored.

        offload_ratio: share of the activations that waits for backward in host memory.
        number, places: the step, and places[j] in its batch of the pass's j-th sequence (as the plan counts them),
        by which random numbers are drawn. The gradient added to the parameters is that of the losses' sum divided by
        `divisor`.
        """
        forward = self._forward(context, batch, divisor, world, offload_ratio, number, places)
        with forward as (made, loss), known_in_backward(loss):
            loss.backward()
        return PassLosses(made.losses.detach(), made.weights)

    @contextmanager
    def _forward(
        self,
        context: PassContext,
        batch: PassInput,
        divisor: float,
        world: World,
        offload_ratio: float,
        number: int,
        places: Sequence[int],
    ) -> Iterator[tuple[PassLosses, torch.Tensor]]:
        """Runs a pass's forward; gives its losses and what is to be backpropagated. The pass is active in the block."""
        device = world.device
        tokens, positions, labels = (
            t.to(device, non_blocking=True) for t in (batch.tokens, batch.positions, batch.labels)
        )
        where = token_places(
            context.layout.segments[context.member],
            batch.by_sequence(places) or range(len(context.layout.lengths)),
            device,
            batch.starts,
        )
        with context.active(), self._randomness.during(self._seed, number, where):
            precision = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
            with self._moving(offload_ratio, device), precision:
                if self._loss is None:
                    made = PassLosses(self._call.losses(tokens, positions, labels), labels[0] != IGNORED)
                else:
                    made = self._own_losses(self._loss, context, batch, tokens, positions)
            if context.order is not None:
                context.order.agree()
            yield made, made.losses.sum() / divisor

    def _moving(self, ratio: float, device: torch.device) -> AbstractContextManager[object]:
        """Returns a context whose forward sends that share of what backward needs to host memory."""
        return offload(ratio, tuple(self.model.parameters()), device=device) if ratio else nullcontext()

    def _own_losses(
        self, loss: Loss, context: PassContext, batch: PassInput, tokens: torch.Tensor, positions: torch.Tensor
    ) -> PassLosses:
        outputs = self._call.outputs(tokens, positions)
        given = LossBatch(context, batch.fields, parts=batch.parts_per_item, device=tokens.device)
        return given.weighed(loss(outputs, given), outputs)

    def _pass(
        self, assignment: Assignment, world: World, plan: Pass, position: int, places: Sequence[int], share: Share
    ) -> RanPass:
        """Runs a pass into a share."""
        context, batch = prepared(assignment, world, plan, position)
        made = self.forward_backward(context, batch, assignment.divisor, world, plan.offload, assignment.number, places)
        return RanPass.counted(context, batch, places, made, share)


def prepared(assignment: Assignment, world: World, plan: Pass, position: int) -> tuple[PassContext, PassInput]:
    """Returns what this rank needs to run a pass of the step, and its tensors."""
    lengths = [assignment.batch.lengths[assignment.places[i]] for i in plan.sequences]
    batch = assignment.inputs[position]
    return prepare_pass(*batch.divided(plan, lengths), world, assignment.speeds), batch


@dataclass(frozen=True, slots=True)
class RanPass:
    """A pass that this rank has run: what it held of which sequences (`places` in the batch), and the losses (n,)."""

    segments: Sequence[Segment]
    places: Sequence[int]
    losses: torch.Tensor

    @classmethod
    def counted(
        cls, context: PassContext, batch: PassInput, places: Sequence[int], made: PassLosses, share: Share
    ) -> RanPass:
        """Adds what a pass has come to to its share."""
        share.loss += made.losses.double().sum()
        share.valid += made.weights.double().sum()
        return cls(context.layout.segments[context.member], batch.by_sequence(places), made.losses)

    def non_finite(self, rank: int) -> Iterator[NonFinite]:
        """Yields the sequences whose losses on this rank are not finite."""
        for segment, losses in zip(self.segments, self.losses.split([len(s) for s in self.segments]), strict=True):
            if not math.isfinite(value := float(losses.sum())):
                yield NonFinite(rank, self.places[segment.sequence], value)


class PassTimer:
    """Seconds of this rank's passes, by the device's own clock where it has one. A pass may come in several parts."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._seconds: dict[int, float] = {}
        self._events: dict[int, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._sent: dict[int, int] = {}
        self._waited: dict[int, float] = {}

    @contextmanager
    def time(self, position: int, name: str) -> Iterator[None]:
        """Times a pass, or a part of it, and records its span."""
        recorder, cuda = self._world.recorder, self._world.device.type == "cuda"
        recorder.take_comm_seconds()
        if cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.setdefault(position, []).append(events)
            events[0].record()
        start, sent = time.perf_counter(), recorder.exchanged_bytes
        with recorder.span(name, "pass"):
            yield
        self._seconds[position] = self._seconds.get(position, 0.0) + time.perf_counter() - start
        self._sent[position] = self._sent.get(position, 0) + recorder.exchanged_bytes - sent
        if cuda:
            events[1].record()
        self._waited[position] = self._waited.get(position, 0.0) + recorder.take_comm_seconds()

    def measurements(self) -> Measurements:
        """Returns what all passes took; waits for the device."""
        for position, parts in self._events.items():
            parts[-1][1].synchronize()
            self._seconds[position] = sum(start.elapsed_time(end) for start, end in parts) / 1e3
        passes = tuple(
            PassMeasure(position, self._world.rank, seconds, self._waited[position], self._sent[position])
            for position, seconds in self._seconds.items()
        )
        busy = max(0.0, sum(self._seconds.values()) - sum(self._waited.values()))
        return Measurements(passes=passes, busy_seconds=busy)


def measured(timer: PassTimer, ran: Sequence[RanPass], rank: int) -> Measurements:
    """Returns what this rank's passes took, and which sequences had losses that are not finite."""
    found = timer.measurements()
    # asked once a step and when the passes are through: on a device the answer has to be waited for
    if not ran or bool(torch.stack([one.losses.sum() for one in ran]).isfinite().all()):
        return found
    return replace(found, non_finite=tuple(blamed for one in ran for blamed in one.non_finite(rank)))


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that may be recomputed. Raises UserError where there are none."""
    layers = list(outermost_layers(model).values())
    if not layers:
        raise UserError(
            "checkpoint_activations needs a model whose layers are in an nn.ModuleList, and this one has none: "
            "turn it off or put the layers in a list"
        )
    return layers
