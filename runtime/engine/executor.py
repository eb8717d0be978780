"""One planned step in a world that stays, for loops of one's own: an engine and a gradient exchange put together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.parallel.attention.api import PassContext
from heteromesh.parallel.model.loss import Loss, PassLosses
from heteromesh.parallel.state.owner import hand_out
from heteromesh.planner.plan import Step
from heteromesh.runtime.engine.api import Measurements, NonFinite, PassMeasure
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.work.reader import PassInput
from heteromesh.runtime.work.sampler import Batch
from heteromesh.runtime.work.source import Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What happened in a step, equal on every rank but for `summed`."""

    loss: float
    """Sum over the valid tokens of the step, divided by their number."""
    valid_tokens: float
    busy_seconds: tuple[float, ...]
    """Per rank, in passes without waiting for peers."""
    passes: tuple[PassMeasure, ...]
    """Of all ranks."""
    exposed_comm_seconds: float
    """Of the gradient sum, what its last rank waited after its last pass."""
    non_finite: tuple[NonFinite, ...]
    """The sequences to blame when the loss is not finite."""
    summed: Summed
    """The gradients, for a state owner."""


class StepExecutor:
    """Executes plans for one model, without `Trainer`:

        executor = StepExecutor(model, world)
        result = executor.run(step, Reader(data).step_inputs(step, batch, world.rank))
        optimizer.step()

    `model` and `autocast` as for `PassMajor`. `speeds`: of every world rank, as the planner had them (they decide which
    rank works on how many heads). `scatter`: for a `ShardedOptimizer`, which takes `result.summed`. `loss`: of the
    user's own, for passes that are measured; gradients of a step are not divided by its weights here.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        speeds: Sequence[float] = (),
        autocast: torch.dtype | None = None,
        checkpoint_activations: bool = False,
        seed: int = 0,
        scatter: bool = False,
        loss: Loss | None = None,
    ) -> None:
        engine = PassMajor(
            model, seed=seed, autocast=autocast, checkpoint_activations=checkpoint_activations, loss=loss
        )
        self._assemble(engine, GradientReducer(model.parameters(), scatter=scatter), world, speeds)
        self._scatter = scatter

    @classmethod
    def of(cls, engine: PassMajor, exchange: GradientReducer, world: World, *, scatter: bool) -> StepExecutor:
        """Returns an executor of parts that exist already."""
        executor = cls.__new__(cls)
        executor._assemble(engine, exchange, world, ())
        executor._scatter = scatter
        return executor

    def _assemble(self, engine: PassMajor, exchange: GradientReducer, world: World, speeds: Sequence[float]) -> None:
        self.engine, self.exchange, self.world = engine, exchange, world
        self.model, self.forwards = engine.model, engine.forwards
        self.speeds = tuple(speeds) or (1.0,) * world.size
        self._calls = 0

    def close(self) -> None:
        """Takes the executor's hooks off the model."""
        self.exchange.close()
        self.engine.close()

    def run(
        self,
        step: Step,
        inputs: Mapping[int, PassInput],
        *,
        valid_tokens: int | None = None,
        number: int | None = None,
    ) -> StepResult:
        """Runs forward and backward of this rank's passes; every rank of the world must call it with the same step.

        inputs: by position in the step (`Reader.step_inputs`). valid_tokens: of the whole step, where known; else the
        ranks add theirs up first. number: of the step, which random numbers are drawn by; else the calls are counted.
        The gradients of the step replace older ones: they are the parameters' (or, with `scatter`, in the result).
        """
        world, exchange = self.world, self.exchange
        if valid_tokens is None:
            valid_tokens = int(world.sum(torch.tensor([float(sum(p.valid for p in inputs.values()))]))[0])
        self._calls += 1
        exchange.begin(self._calls, world)
        number = self._calls if number is None else number
        measured = self.engine.run(self._assignment(step, inputs, valid_tokens, number), world, exchange)
        exchange.flush()
        everyone: list[Measurements] = world.gather(measured)
        with world.recorder.span("gradient sum, exposed", "wait"):
            summed = exchange.finish()
        exchange.committed()
        if not self._scatter and summed.tensors:
            hand_out(summed, exchange.buckets)
        loss = summed.loss / (summed.valid or 1.0)
        return StepResult(
            loss=loss,
            valid_tokens=summed.valid,
            busy_seconds=tuple(m.busy_seconds for m in everyone),
            passes=tuple(p for m in everyone for p in m.passes),
            exposed_comm_seconds=summed.exposed_seconds,
            non_finite=() if math.isfinite(loss) else tuple(n for m in everyone for n in m.non_finite),
            summed=summed,
        )

    def forward_backward(
        self, context: PassContext, batch: PassInput, divisor: int, offload_ratio: float = 0.0
    ) -> PassLosses:
        """Runs one pass without summing gradients; see `PassMajor.forward_backward`."""
        return self.engine.forward_backward(context, batch, divisor, self.world, offload_ratio)

    def _assignment(self, step: Step, inputs: Mapping[int, PassInput], valid: int, number: int) -> Assignment:
        count = len(step.batch)
        batch = Batch(index=0, epoch=0, sequences=tuple(range(count)), lengths=step.batch, position=count)
        return Assignment(
            number=number,
            batch=batch,
            places=batch.sequences,
            step=step,
            inputs=inputs,
            divisor=max(1, valid),
            speeds=self.speeds,
        )
