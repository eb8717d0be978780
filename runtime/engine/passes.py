"""The pass-major engine: this rank's passes in list order, each through all layers, forward and backward."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
        self.model, self._seed, self._autocast = model, seed, autocast
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
        timer, ran = _PassTimer(world), []
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
        measured = timer.measurements()
        # asked once a step and when the passes are through: on a device the answer has to be waited for
        if not ran or bool(torch.stack([one.losses.sum() for one in ran]).isfinite().all()):
            return measured
        found = [blamed for one in ran for blamed in one.non_finite(world.rank)]
        return replace(measured, non_finite=tuple(found))

    def forward_backward(
        self,
        context: PassContext,
        batch: PassInput,
        divisor: int,
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
        device = world.device
        tokens, positions, labels = (
            t.to(device, non_blocking=True) for t in (batch.tokens, batch.positions, batch.labels)
        )
        weights = tuple(self.model.parameters())
        where = token_places(
            context.layout.segments[context.member],
            batch.by_sequence(places) or range(len(context.layout.lengths)),
            device,
            batch.starts,
        )
        with context.active(), self._randomness.during(self._seed, number, where):
            moving = offload(offload_ratio, weights, device=device) if offload_ratio else nullcontext()
            with moving, torch.autocast(device.type, self._autocast) if self._autocast else nullcontext():
                if self._loss is None:
                    made = PassLosses(self._call.losses(tokens, positions, labels), labels[0] != IGNORED)
                else:
                    made = self._own_losses(self._loss, context, batch, tokens, positions)
            if context.order is not None:
                context.order.agree()
            loss = made.losses.sum() / divisor
            with known_in_backward(loss):
                loss.backward()
        return PassLosses(made.losses.detach(), made.weights)

    def _own_losses(
        self, loss: Loss, context: PassContext, batch: PassInput, tokens: torch.Tensor, positions: torch.Tensor
    ) -> PassLosses:
        outputs = self._call.outputs(tokens, positions)
        given = LossBatch(context, batch.fields, parts=batch.parts_per_item, device=tokens.device)
        return given.weighed(loss(outputs, given), outputs)

    def _pass(
        self, assignment: Assignment, world: World, plan: Pass, position: int, places: Sequence[int], share: Share
    ) -> _Ran:
        """Runs a pass into a share."""
        lengths, batch = [assignment.batch.lengths[i] for i in places], assignment.inputs[position]
        context = prepare_pass(*batch.divided(plan, lengths), world, assignment.speeds)
        losses, weights = self.forward_backward(
            context, batch, assignment.divisor, world, plan.offload, assignment.number, places
        )
        share.loss += losses.double().sum()
        share.valid += weights.double().sum()
        return _Ran(context.layout.segments[context.member], batch.by_sequence(places), losses)


@dataclass(frozen=True, slots=True)
class _Ran:
    """A pass that this rank has run: what it held of which sequences (`places` in the batch), and the losses (n,)."""

    segments: Sequence[Segment]
    places: Sequence[int]
    losses: torch.Tensor

    def non_finite(self, rank: int) -> Iterator[NonFinite]:
        """Yields the sequences whose losses on this rank are not finite."""
        for segment, losses in zip(self.segments, self.losses.split([len(s) for s in self.segments]), strict=True):
            if not math.isfinite(value := float(losses.sum())):
                yield NonFinite(rank, self.places[segment.sequence], value)


class _PassTimer:
    """Seconds of this rank's passes, by the device's own clock where it has one."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._seconds: dict[int, float] = {}
        self._events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._sent: dict[int, int] = {}
        self._waited: dict[int, float] = {}

    @contextmanager
    def time(self, position: int, name: str) -> Iterator[None]:
        """Times one pass and records its span."""
        recorder, cuda = self._world.recorder, self._world.device.type == "cuda"
        recorder.take_comm_seconds()
        if cuda:
            self._events[position] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[position][0].record()
        start, sent = time.perf_counter(), recorder.exchanged_bytes
        with recorder.span(name, "pass"):
            yield
        self._seconds[position] = time.perf_counter() - start
        self._sent[position] = recorder.exchanged_bytes - sent
        if cuda:
            self._events[position][1].record()
        self._waited[position] = recorder.take_comm_seconds()

    def measurements(self) -> Measurements:
        """Returns what all passes took; waits for the device."""
        for position, (start, end) in self._events.items():
            end.synchronize()
            self._seconds[position] = start.elapsed_time(end) / 1e3
        passes = tuple(
            PassMeasure(position, self._world.rank, seconds, self._waited[position], self._sent[position])
            for position, seconds in self._seconds.items()
        )
        busy = max(0.0, sum(self._seconds.values()) - sum(self._waited.values()))
        return Measurements(passes=passes, busy_seconds=busy)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that may be recomputed. Raises UserError where there are none."""
    layers = list(outermost_layers(model).values())
    if not layers:
        raise UserError(
            "checkpoint_activations needs a model whose layers are in an nn.ModuleList, and this one has none: "
            "turn it off or put the layers in a list"
        )
    return layers
