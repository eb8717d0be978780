"""Runs a step: this rank's passes in list order, gradients summed over the world while the last backward runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.gradients.sum import GradientSum
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext, prepare_pass
from heteromesh.parallel.attention.layout import layout_of
from heteromesh.parallel.model.call import ModelCall
from heteromesh.parallel.model.draws import token_places
from heteromesh.parallel.model.layers import outermost_layers
from heteromesh.parallel.model.offload import offload
from heteromesh.parallel.model.randomness import PassRandomness
from heteromesh.parallel.model.recompute import keep_activations, recompute_layers
from heteromesh.planner.plan import Step
from heteromesh.runtime.work.reader import PassInput


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A sequence whose loss is not a number or infinite."""

    rank: int
    sequence: int
    """Index into the step's batch."""
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What happened in a step, equal on every rank. The gradients are in the parameters or their owners' shards."""

    loss: float
    """Sum over the valid tokens of the step, divided by their number."""
    valid_tokens: int
    busy_seconds: tuple[float, ...]
    """Per rank, in passes without waiting for peers."""
    pass_seconds: dict[tuple[int, int], float]
    """By (rank, position in the step)."""
    pass_bytes: dict[tuple[int, int], int]
    """The same: what the rank sent in the pass's exchanges."""
    pass_waits: dict[tuple[int, int], float]
    """The same: seconds that it waited for them."""
    votes: tuple[float, ...]
    """The votes summed over the ranks."""
    exposed_comm_seconds: float
    """Of the gradient sum, what the rank that was last through its passes waited (the others waited for it too); and
    the longest that a rank's passes waited for parameters from a sharded optimizer's owners."""
    non_finite: tuple[NonFinite, ...]
    """The sequences to blame when the loss is not finite."""


class StepExecutor:
    """Executes plans for one model. Usable without `Trainer`:

        executor = StepExecutor(model, world)
        result = executor.run(step, Reader(data).step_inputs(step, batch, world.rank))
        optimizer.step()

    `model(input_ids, position_ids)` returns logits (1, n, vocab), as a tensor or in `.logits`; or, if it takes
    `targets`, per-token losses (1, n). `autocast`: a dtype for torch.autocast. `speeds`: of every world rank, as the
    planner had them (they decide which rank works on how many heads). `seed`: of dropouts and the like. `collectives`:
    what gradients are summed with; without it torch's own. A `ShardedOptimizer` takes over `gradients`.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        speeds: Sequence[float] = (),
        seed: int = 0,
        autocast: torch.dtype | None = None,
        checkpoint_activations: bool = False,
        collectives: Collectives | None = None,
    ) -> None:
        self.model, self.world = model, world
        self.speeds = tuple(speeds) or (1.0,) * world.size
        self._autocast, self._seed, self._number = autocast, seed, 0
        self._randomness = PassRandomness(model)
        self._call = ModelCall(model)
        self.gradients = GradientSum(world, collectives)
        self.gradients.attach(model.parameters())
        self.forwards = 2 if checkpoint_activations else 1
        """How often a layer's forward runs in a pass."""
        self._recomputed = recompute_layers(_layers(model)) if checkpoint_activations else []

    def close(self) -> None:
        """Takes the executor's hooks off the model."""
        self._randomness.close()
        self.gradients.detach()
        keep_activations(self._recomputed)

    def run(
        self,
        step: Step,
        inputs: Mapping[int, PassInput],
        *,
        valid_tokens: int | None = None,
        votes: Sequence[float] = (),
        number: int | None = None,
    ) -> StepResult:
        """Forward and backward of this rank's passes. Every rank of the world must call this with the same step.

        inputs: by position in the step (`Reader.step_inputs`). valid_tokens: of the whole step, where known; else the
        ranks add theirs up first. votes: numbers to be summed over the ranks along with the loss. number: of the
        step, which random numbers are drawn by; else the calls are counted. The gradients of the step replace older
        ones.
        """
        if valid_tokens is None:
            valid_tokens = int(self.world.sum(torch.tensor([float(sum(p.valid for p in inputs.values()))]))[0])
        self._number = self._number + 1 if number is None else number
        self.gradients.clear(self.model.parameters())
        mine = step.passes_of(self.world.rank)
        timer = _PassTimer(self.world)
        losses: dict[int, torch.Tensor] = {}
        for position, plan in mine:
            lengths = [step.batch[i] for i in plan.sequences]
            with timer.time(position, f"pass {position} {plan.method} x{len(plan.ranks)}"):
                context = prepare_pass(plan, lengths, self.world, self.speeds)
                if position == mine[-1][0]:
                    self.gradients.arm()
                losses[position] = self.forward_backward(
                    context, inputs[position], max(1, valid_tokens), plan.offload, self._number, plan.sequences
                )
        with self.world.recorder.span("gradient sum, exposed", "wait"):
            self._finish_gradients(bool(mine))
        return self._result(step, losses, timer, valid_tokens, votes)

    def forward_backward(
        self,
        context: PassContext,
        batch: PassInput,
        valid: int,
        offload_ratio: float = 0.0,
        number: int = 0,
        places: Sequence[int] = (),
    ) -> torch.Tensor:
        """Runs one pass without summing gradients; per-token losses (n,), detached, 0 where ignored.

        offload_ratio: share of the activations that waits for backward in host memory.
        number, places: the step and places[j] of the pass's j-th sequence in its batch, by which random numbers are
        drawn. The gradient added to the parameters is that of the losses' sum divided by `valid`.
        """
        device = self.world.device
        tokens, positions, labels = (
            t.to(device, non_blocking=True) for t in (batch.tokens, batch.positions, batch.labels)
        )
        weights = tuple(self.model.parameters())
        where = token_places(
            context.layout.segments[context.member], places or range(len(context.layout.lengths)), device
        )
        with context.active(), self._randomness.during(self._seed, number, where):
            moving = offload(offload_ratio, weights, device=device) if offload_ratio else nullcontext()
            with moving, torch.autocast(device.type, self._autocast) if self._autocast else nullcontext():
                losses = self._call.losses(tokens, positions, labels)
            (losses.sum() / valid).backward()
        return losses.detach()

    def _finish_gradients(self, armed: bool) -> None:
        if self.world.size == 1:
            return
        if not armed:
            self.gradients.arm()
        self.gradients.finish()

    def _result(
        self, step: Step, losses: Mapping[int, torch.Tensor], timer: _PassTimer, valid: int, votes: Sequence[float]
    ) -> StepResult:
        """One vector summed over the world: loss, numbers of each rank, seconds of each rank's passes, votes."""
        total = float(torch.stack([t.double().sum() for t in losses.values()]).sum()) if losses else 0.0
        slots = {(rank, position): i for i, (rank, position) in enumerate(_slots(step))}
        rank, size = self.world.rank, self.world.size
        seconds, busy = timer.read()
        ranks = torch.zeros(3, size, dtype=torch.float64)
        ranks[:, rank] = torch.tensor([busy, *self.gradients.take_exposed_seconds()])
        passes = torch.zeros(3, len(slots), dtype=torch.float64)
        for position, value in seconds.items():
            row = [value, timer.sent[position], timer.waited[position]]
            passes[:, slots[rank, position]] = torch.tensor(row, dtype=torch.float64)
        parts = [torch.tensor([total], dtype=torch.float64), ranks.flatten(), passes.flatten()]
        parts.append(torch.tensor(votes, dtype=torch.float64))
        sums = self.world.sum(torch.cat(parts)).split([len(part) for part in parts])
        loss = float(sums[0]) / max(1, valid)
        busy_seconds, gradients, parameters = sums[1].view(3, size).tolist()
        took, sent, waited = sums[2].view(3, len(slots)).tolist()
        return StepResult(
            loss=loss,
            valid_tokens=valid,
            busy_seconds=tuple(busy_seconds),
            pass_seconds=dict(zip(slots, took, strict=True)),
            pass_bytes=dict(zip(slots, map(int, sent), strict=True)),
            pass_waits=dict(zip(slots, waited, strict=True)),
            votes=tuple(sums[3].tolist()),
            exposed_comm_seconds=min(gradients) + max(parameters),
            non_finite=() if math.isfinite(loss) else self._find_non_finite(step, losses),
        )

    def _find_non_finite(self, step: Step, losses: Mapping[int, torch.Tensor]) -> tuple[NonFinite, ...]:
        found = []
        for position, plan in step.passes_of(self.world.rank):
            member, row = plan.ranks.index(self.world.rank), 0
            for segment in layout_of(plan, [step.batch[i] for i in plan.sequences]).segments[member]:
                value = float(losses[position][row : row + len(segment)].sum())
                row += len(segment)
                if not math.isfinite(value):
                    found.append(NonFinite(self.world.rank, plan.sequences[segment.sequence], value))
        return tuple(entry for entries in self.world.gather(tuple(found)) for entry in entries)


class _PassTimer:
    """Seconds of this rank's passes, by the device's own clock where it has one."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._seconds: dict[int, float] = {}
        self._events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self.sent: dict[int, int] = {}
        """Bytes that this rank sent in a pass's exchanges, by position."""
        self.waited: dict[int, float] = {}
        """Seconds that it waited for them."""

    @contextmanager
    def time(self, position: int, name: str) -> Iterator[None]:
        """Times one pass and records its span."""
        self._world.recorder.take_comm_seconds()
        cuda = self._world.device.type == "cuda"
        if cuda:
            self._events[position] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[position][0].record()
        start, sent = time.perf_counter(), self._world.recorder.exchanged_bytes
        with self._world.recorder.span(name, "pass"):
            yield
        self._seconds[position] = time.perf_counter() - start
        self.sent[position] = self._world.recorder.exchanged_bytes - sent
        if cuda:
            self._events[position][1].record()
        self.waited[position] = self._world.recorder.take_comm_seconds()

    def read(self) -> tuple[dict[int, float], float]:
        """(seconds by position, seconds in passes without waiting for exchanges)."""
        for position, (start, end) in self._events.items():
            end.synchronize()
            self._seconds[position] = start.elapsed_time(end) / 1e3
        return self._seconds, max(0.0, sum(self._seconds.values()) - sum(self.waited.values()))


def _slots(step: Step) -> list[tuple[int, int]]:
    return [(rank, position) for position, plan in enumerate(step.passes) for rank in plan.ranks]


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that may be recomputed. Raises UserError where there are none."""
    layers = list(outermost_layers(model).values())
    if not layers:
        raise UserError(
            "checkpoint_activations needs a model whose layers are in an nn.ModuleList, and this one has none: "
            "turn it off or put the layers in a list"
        )
    return layers
