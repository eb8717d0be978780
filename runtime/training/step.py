"""A training step as a transaction: planned, worked through, summed, committed, applied. The same in every mode."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from heteromesh.comm.gradients.exchange import GradientExchange, Summed
from heteromesh.comm.session import Attempt, Committed
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.pass_buffers import Changes, PassBuffers
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.runtime.engine.api import Engine, Measurements
from heteromesh.runtime.engine.loss_scale import LossScale
from heteromesh.runtime.hooks.api import MemberReport, Round, StepCommitted, Stop
from heteromesh.runtime.records.metrics import StepMetrics
from heteromesh.runtime.training.job import Job
from heteromesh.runtime.training.progress import TrainingProgress
from heteromesh.runtime.training.transactions import Transaction
from heteromesh.runtime.work.source import Assignment, WorkSource


@dataclass(slots=True)
class _Current:
    """The step that this rank is in, over all attempts at it."""

    number: int
    rounds: list[Round] = field(default_factory=list)
    measured: Measurements = field(default_factory=Measurements)
    plan_wait_seconds: float = 0.0
    data_wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """An attempt at a step, on its way to be committed."""

    assignment: Assignment
    summed: Summed
    reports: tuple[MemberReport, ...]
    rounds: tuple[Round, ...]
    exposed_seconds: float
    began: float
    buffers: tuple[Changes, ...]
    """By rank, what its passes did to the model's buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """What a step is made of; each may be of any kind (see docs/architecture.md)."""

    work: WorkSource
    engine: Engine
    exchange: GradientExchange
    state: StateOwner
    buffers: PassBuffers


class TrainStep(Transaction):
    """The next step. Calls the hooks when it is applied."""

    def __init__(
        self,
        job: Job,
        progress: TrainingProgress,
        parts: StepParts,
        *,
        asked: Callable[[], Stop | None],
        kept: Callable[[], str],
        hooks: Callable[[StepCommitted], None],
        busy: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`asked`: why this rank wants to stop, if it does. `kept`: what to do after a failure, for sentences. `busy`:
        see `Session`."""
        self._job, self._progress, self._parts = job, progress, parts
        self._asked, self._kept, self._hooks = asked, kept, hooks
        self._busy = busy
        self._current = _Current(0)
        self._norm = 0.0
        self._known: World | None = None
        """The world whose ranks know what the others hold: that in which the last step was committed."""
        self._members: dict[int, str] = {}
        self._mark = time.perf_counter()

    def start(self) -> None:
        """The first step's time begins now."""
        self._mark = time.perf_counter()

    def due(self, world: World) -> bool:
        return self._progress.training

    def attempt(self, world: World) -> Attempt[_Result]:
        number, parts = self._progress.done + 1, self._parts
        began, world.recorder.step = time.perf_counter(), number
        if self._current.number != number:
            self._current = _Current(number)
            parts.buffers.begin()
        parameters = parts.state.refresh(world)
        parts.exchange.begin(number, world)
        if not parts.exchange.held():
            parts.buffers.undo()  # what an attempt did of which nothing is kept
        if self._known is not world:
            # after a change of members nobody knows what the others hold
            held = world.gather(parts.exchange.held())
            parts.exchange.settle(dict(zip(world.members, held, strict=True)))
        assignment = self._work(number, world)
        parts.exchange.flush()
        told = world.gather((self._report(), parts.buffers.changes(world.rank == 0)))
        reports = tuple(report for report, _ in told)
        waited = time.perf_counter()
        with world.recorder.span("gradient sum, exposed", "wait"):
            summed = parts.exchange.finish()
            copied = parts.state.copy_sums(summed, world)
        exposed = time.perf_counter() - waited + max(r.parameter_wait_seconds for r in reports)
        result = _Result(
            assignment=assignment,
            summed=replace(summed, scale=assignment.divisor / (summed.valid or 1.0)),
            reports=reports,
            rounds=tuple(self._current.rounds),
            exposed_seconds=exposed,
            began=began,
            buffers=tuple(changes for _, changes in told),
        )
        return Attempt(result, f"{number}:{assignment.batch.index}:{summed.digest}{copied}:{parameters}")

    def overlap(self, result: _Result) -> None:
        limit = math.inf if self._job.config.clip_norm is None else self._job.config.clip_norm
        loss = result.summed.loss
        self._norm = self._parts.state.take(result.summed, limit, self._world) if math.isfinite(loss) else math.nan

    def committed(self, done: Committed[_Result]) -> None:
        result, world, number = done.result, done.world, self._progress.done + 1
        loss = result.summed.loss / (result.summed.valid or 1.0)
        self._check(number, loss, result)
        optimizer, schedule = self._job.optimizer, self._job.schedule
        rate = float(optimizer.param_groups[0]["lr"])
        scale = replace(self._progress.scale) if self._progress.scale is not None else None
        skipped = not math.isfinite(self._norm)
        with world.recorder.span("optimizer", "optimizer"):
            if skipped:
                self._parts.state.skip()
            else:
                self._parts.state.update()
        if schedule is not None and not skipped:
            schedule.step()
        self._parts.buffers.settle(result.buffers)
        self._parts.exchange.committed()
        self._apply(number, result, world)
        now = time.perf_counter()
        metrics = self._metrics(number, loss, rate, result, now - self._mark, scale)
        before, self._members = self._members, dict(zip(world.members, world.names, strict=True))
        self._hooks(
            StepCommitted(
                metrics=metrics,
                world=world,
                before=before or self._members,
                batch=result.assignment.batch,
                rounds=result.rounds,
                reports=result.reports,
                correction=result.assignment.correction,
                digest=done.digest,
                attempts=done.attempts,
                work_seconds=now - result.began,
            )
        )
        self._mark = now
        self._parts.work.committed(world, number, not self._progress.training)

    def _work(self, number: int, world: World) -> Assignment:
        """Plans and works through what nobody holds."""
        current, self._world = self._current, world
        # the planner is another process: waiting for it is no sign of life
        with self._busy():
            assignment = self._parts.work.plan(number, world, self._parts.exchange.done)
        if self._progress.scale is not None:
            assignment = replace(assignment, divisor=assignment.divisor / self._progress.scale.value)
        current.plan_wait_seconds += assignment.plan_wait_seconds
        current.data_wait_seconds += assignment.data_wait_seconds
        if assignment.step is not None:
            current.rounds.append(Round(members=world.members, places=assignment.places, plan=assignment.step))
            measured = self._parts.engine.run(assignment, world, self._parts.exchange)
            current.measured = current.measured.plus(measured)
        return assignment

    def _report(self) -> MemberReport:
        current = self._current
        return MemberReport(
            held=self._parts.exchange.held(),
            measured=current.measured,
            plan_wait_seconds=current.plan_wait_seconds,
            data_wait_seconds=current.data_wait_seconds,
            parameter_wait_seconds=self._parts.state.take_exposed_seconds(),
            stop=self._asked(),
        )

    def _apply(self, number: int, result: _Result, world: World) -> None:
        if self._progress.scale is not None:
            self._progress.scale.settle(finite=math.isfinite(self._norm))
        self._progress.done = number
        self._progress.sampled = self._job.sampler.state_after(result.assignment.batch)
        self._progress.stop = next((r.stop for r in result.reports if r.stop is not None), None)
        self._known = world

    def _check(self, number: int, loss: float, result: _Result) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {number}: {_blame(result)}; look at that sequence, lower the learning "
                f"rate or clip_norm, then resume; {self._kept()}"
            )
        if not math.isfinite(self._norm) and self._progress.scale is not None:
            self._progress.scale.check(number)
        elif not math.isfinite(self._norm):
            raise UserError(
                f"the gradient norm is {self._norm} at step {number} although the loss is finite: "
                f"lower the learning rate or use fp32; {self._kept()}"
            )

    def _metrics(
        self, number: int, loss: float, rate: float, result: _Result, seconds: float, scale: LossScale | None
    ) -> StepMetrics:
        tokens, plans = result.assignment.batch.tokens, [r.plan for r in result.rounds]
        busy = [r.measured.busy_seconds for r in result.reports]
        return StepMetrics(
            step=number,
            loss=loss,
            grad_norm=self._norm if math.isfinite(self._norm) else None,
            loss_scale=scale.value if scale is not None else None,
            learning_rate=rate,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            predicted_seconds=sum(plan.seconds for plan in plans),
            measured_seconds=seconds,
            gap=plans[0].gap if plans else 0.0,
            imbalance=max(busy) * len(busy) / max(1e-9, sum(busy)),
            plan_wait_seconds=max(r.plan_wait_seconds for r in result.reports),
            data_wait_seconds=max(r.data_wait_seconds for r in result.reports),
            exposed_comm_seconds=result.exposed_seconds,
            solve_seconds=sum(plan.solve_seconds for plan in plans),
            passes=sum(len(plan.passes) for plan in plans),
        )


def _blame(result: _Result) -> str:
    """Says which sequence a loss that is not finite comes from."""
    worst = next((n for report in result.reports for n in report.measured.non_finite), None)
    if worst is None:
        return "no single sequence stands out"
    batch = result.assignment.batch
    return (
        f"rank {worst.rank} had {worst.loss} on sequence {batch.sequences[worst.sequence]} "
        f"of the data ({batch.lengths[worst.sequence]} tokens)"
    )
