"""The training loop behind `Trainer.fit`."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.sharded import ShardedOptimizer
from heteromesh.planner.cost.correction import Correction, Learner
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.plan import Step
from heteromesh.planner.report.text import first_passes
from heteromesh.runtime.engine.baselines import EvenSplit, compare
from heteromesh.runtime.engine.passes import StepExecutor, StepResult
from heteromesh.runtime.process.interrupt import Interrupt
from heteromesh.runtime.process.peers import SILENCE_SECONDS, PeerWatch
from heteromesh.runtime.records.checkpoint import Checkpoints
from heteromesh.runtime.records.metrics import HEADER, ProgressBar, StepMetrics
from heteromesh.runtime.records.rundir import CHECKPOINTS, RunDirectory
from heteromesh.runtime.training.build import find_cluster, find_collectives, find_compression, find_costs, find_plan
from heteromesh.runtime.training.consistency import agree, job_facts
from heteromesh.runtime.work.feed import PlanFeed, Planned, PlanningFailed, Prepared
from heteromesh.runtime.work.plan_service import PlanService
from heteromesh.runtime.work.sampler import Batch

if TYPE_CHECKING:
    from heteromesh.runtime.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """How a run went."""

    first_step: int
    """The first step of this run, from 1; more than 1 after a resume."""
    last_step: int
    losses: tuple[float, ...]
    """One a step."""
    plan_wait_share: float
    """Of the steps' time, waited for plans that were late."""
    comparisons: tuple[EvenSplit, ...]
    signal: int | None
    """The signal that ended the run early."""

    def summary(self) -> str:
        """For people, a few lines."""
        if not self.losses:
            return "no step was left to do"
        lines = [
            f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f} in steps {self.first_step} to {self.last_step}",
            f"waited for late plans: {self.plan_wait_share:.3%} of the time",
            *(comparison.line() for comparison in self.comparisons),
        ]
        return "\n".join(lines)


class TrainingLoop:
    """One call of `Trainer.fit` in a world. Everything it opens is closed by `stack`."""

    def __init__(self, trainer: Trainer, world: World, stack: ExitStack) -> None:
        self.trainer, self.config, self.world = trainer, trainer.config, world
        self.done = 0
        self.path = Path(self.config.run_dir)
        self.interrupt = stack.enter_context(Interrupt())
        limit = min(SILENCE_SECONDS, self.config.timeout_seconds)
        stack.enter_context(PeerWatch(world, limit, self._way_out))
        agree(world, lambda: job_facts(trainer, world.size))
        self.cluster = find_cluster(self.config, world.size)
        self.given_plan = world.once(lambda: find_plan(self.config, self.cluster))
        self.directory: RunDirectory | None = None
        world.once(self._open_directory)
        self.stopped: int | None = None
        self.service: PlanService | None = None
        if self.directory:
            stack.callback(self.directory.close)
            stack.push(self._trace_of_a_failure)
            self.service = stack.enter_context(PlanService(self.config.plan_seconds, self.given_plan))
        trainer.model.to(world.device)
        world.broadcast_tensors((*trainer.model.parameters(), *trainer.model.buffers()))
        self.executor = StepExecutor(
            trainer.model,
            world,
            seed=self.config.seed,
            autocast=self.config.autocast,
            checkpoint_activations=self.config.checkpoint_activations,
            collectives=stack.enter_context(find_collectives(self.config, self.cluster, trainer.optimizer, world)),
        )
        stack.callback(self.executor.close)
        self.optimizer: torch.optim.Optimizer | ShardedOptimizer = trainer.optimizer
        if self.config.shard_optimizer and world.size > 1:
            self.optimizer = ShardedOptimizer(trainer.optimizer, trainer.model, self.executor.gradients)
            stack.callback(self.optimizer.close)
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, world, self.config.keep_checkpoints)
        stack.callback(self.checkpoints.close)
        self.done = self._resume() if self.config.resume else 0
        self._plan(stack)
        self.losses: list[float] = []
        self.overheads: deque[float] = deque(maxlen=9)
        self.recent: deque[tuple[Batch, Step]] = deque(maxlen=max(1, self.config.compare_batches))
        self._progress = ProgressBar(self.config.max_steps)

    def run(self) -> TrainingReport:
        """Trains, saves, compares."""
        first, waited = self.done + 1, 0.0
        self._say(HEADER)
        began = mark = time.perf_counter()
        while self.done < self.config.max_steps and self.stopped is None:
            prepared, plan_wait, data_wait = self._next()
            metrics, result = self._step(prepared, plan_wait, data_wait, mark)
            mark = time.perf_counter()
            waited += metrics.plan_wait_seconds
            self._record(metrics, prepared, result, (mark - began) / (self.done - first + 1))
        self.feed.close()
        elapsed = time.perf_counter() - began
        self._finish()
        self._write_trace()
        comparisons: tuple[EvenSplit, ...] = ()
        if self.config.compare_batches and self.stopped is None:
            costs = self.world.once(lambda: self.correction).applied(self.costs)
            self.executor.speeds = costs.speeds
            comparisons = compare(self.executor, self.trainer.reader, tuple(self.recent), costs, self._asked)
            self.stopped = self._asked()
        return TrainingReport(
            first_step=first,
            last_step=self.done,
            losses=tuple(self.losses),
            plan_wait_share=waited / elapsed if self.losses else 0.0,
            comparisons=comparisons,
            signal=self.stopped,
        )

    def _next(self) -> tuple[Prepared, float, float]:
        """The next step; where it can't be planned, what was trained is saved before the error is raised."""
        try:
            return self.feed.next()
        except PlanningFailed as failed:
            self._finish()
            raise failed.reason from None

    def _asked(self) -> int | None:
        """The signal that any rank was sent; equal on every rank."""
        return max(self.world.gather(self.interrupt.signal or 0)) or None

    def _way_out(self) -> str:
        """For a user whose run was cut off from other ranks, so without asking them."""
        every = self.config.checkpoint_every
        if self.config.resume or (every and self.done >= every):
            return f"start the run again with resume=True: it continues at the last whole checkpoint in {self.path}"
        return "start the run anew (no checkpoint had been written; checkpoint_every says how often to)"

    def _open_directory(self) -> None:
        self.directory = RunDirectory(self.path, resume=self.config.resume)

    def _resume(self) -> int:
        path = self.world.once(self.checkpoints.latest)
        if path is None:
            raise UserError(f"run directory {self.path} has no whole checkpoint to resume: start anew in another one")
        state = self.checkpoints.load(path, self.trainer.model, self.optimizer)
        self.trainer.sampler.load_state_dict(state["sampler"])
        if self.trainer.schedule is not None:
            self.trainer.schedule.load_state_dict(state["schedule"])
        self._say(f"resumed from {path} at step {state['step']}")
        return int(state["step"])

    def _plan(self, stack: ExitStack) -> None:
        """Costs, compression, planner and feed; config.json."""
        cluster = self.cluster
        self.costs = find_costs(self.config, cluster, self.executor, self.trainer.reader)
        self.executor.speeds = self.costs.speeds
        compression = stack.enter_context(find_compression(self.config, self.executor, self.costs))
        if compression:
            self.executor.gradients.collectives = compression
        self.world.recorder.spans.clear()
        resolved = {
            "trainer": asdict(self.config),
            "ranks": self.world.size,
            "cluster": {"name": cluster.name, "fingerprint": cluster.fingerprint},
            "costs": costs_to_json(self.costs),
            "gradient_compression": "int8" if compression else "none",
        }
        if self.directory:
            self.directory.start(resolved, self.done)
        # on a CUDA device nobody waits for an exchange on the host: a split pass's seconds hold what it waited
        self.learner = Learner(waits_known=self.world.device.type == "cpu")
        self.correction = Correction(seconds_per_step=self.costs.seconds_per_step)
        if self.service:
            self.service.use(self.costs)
        self.feed = PlanFeed(
            self.world, self.trainer.reader, self._propose, self.done, self.config.max_steps, self.config.plan_ahead
        )

    def _propose(self, index: int) -> Planned:
        """Rank 0, in the plan thread: the next batch and its plan."""
        assert self.service
        batch = self.trainer.sampler.next_batch()
        correction = self.correction
        return Planned(batch, self.service.plan(index, batch.lengths, correction), correction)

    def _step(
        self, prepared: Prepared, plan_wait: float, data_wait: float, mark: float
    ) -> tuple[StepMetrics, StepResult]:
        """One update. `mark`: when the step before ended."""
        world, step, number = self.world, prepared.step, self.done + 1
        world.recorder.step = number
        waits = [0.0] * (2 * world.size)
        waits[2 * world.rank : 2 * world.rank + 2] = plan_wait, data_wait
        self.executor.speeds = prepared.correction.applied(self.costs).speeds
        start, stop = time.perf_counter(), float(self.interrupt.signal is not None)
        result = self.executor.run(
            step, prepared.inputs, valid_tokens=prepared.valid_tokens, votes=[stop, *waits], number=number
        )
        if result.non_finite or not math.isfinite(result.loss):
            raise UserError(self._blame(number, prepared, result))
        with world.recorder.span("optimizer", "optimizer"):
            norm, rate = self._update(number)
        self.done = number
        self.losses.append(result.loss)
        if result.votes[0]:
            self.stopped = self._asked()
        seconds = time.perf_counter() - mark
        self._learn(step, time.perf_counter() - start, result)
        tokens = sum(step.batch)
        busy = result.busy_seconds
        return (
            StepMetrics(
                step=number,
                loss=result.loss,
                grad_norm=norm,
                learning_rate=rate,
                tokens=tokens,
                tokens_per_second=tokens / seconds,
                predicted_seconds=step.seconds,
                measured_seconds=seconds,
                gap=step.gap,
                imbalance=max(busy) * len(busy) / max(1e-9, sum(busy)),
                plan_wait_seconds=max(result.votes[1::2]),
                data_wait_seconds=max(result.votes[2::2]),
                exposed_comm_seconds=result.exposed_comm_seconds,
                solve_seconds=step.solve_seconds,
                passes=len(step.passes),
            ),
            result,
        )

    def _update(self, number: int) -> tuple[float, float]:
        """Clips and steps the optimizer; (gradient norm, learning rate)."""
        optimizer = self.optimizer
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        if isinstance(optimizer, ShardedOptimizer):
            norm = optimizer.clip_gradients(limit)
        else:
            parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient norm is {norm} at step {number} although the loss is finite: "
                f"lower the learning rate or use fp32; {self._kept()}"
            )
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if self.trainer.schedule is not None:
            self.trainer.schedule.step()
        return norm, rate

    def _record(self, metrics: StepMetrics, prepared: Prepared, result: StepResult, pace: float) -> None:
        """Writes and prints the step; saves when a checkpoint is due. pace: seconds a step so far."""
        step = prepared.step
        self.state = self._trainer_state(prepared.batch)
        if self.config.compare_batches:
            self.recent.append((prepared.batch, step))
        if len(self.losses) == 1:
            self._report_shards()
        if self.directory:
            self._progress.clear()
            if metrics.step <= self.config.print_plans:
                self._say(first_passes(step, self.world.size, f"Step {metrics.step}"))
            eta = pace * (self.config.max_steps - self.done)
            self._say(metrics.line(eta))
            self._progress.show(self.done, eta)
            correction = asdict(prepared.correction)
            self.directory.record(metrics, step, _measured(metrics, result), correction=correction)
        if self.config.checkpoint_every and self.done % self.config.checkpoint_every == 0:
            self.checkpoints.save(self.done, self.trainer.model, self.optimizer, self.state)

    def _report_shards(self) -> None:
        """After the first update, when the optimizer has its state."""
        if isinstance(self.optimizer, ShardedOptimizer):
            sizes = self.world.gather(self.optimizer.state_bytes)
            self._say("optimizer state per rank, MB: " + " ".join(f"{size / 1e6:.1f}" for size in sizes))

    def _learn(self, step: Step, seconds: float, result: StepResult) -> None:
        """Corrects the costs: what passes took, and a step beyond them (the exposed gradient sum, the optimizer)."""
        if not self.service:
            return
        spent = [0.0] * self.world.size
        for (rank, _), took in result.pass_seconds.items():
            spent[rank] += took
        if len(self.losses) > 1:  # the first step has allocations that no other has
            self.overheads.append(max(0.0, seconds - max(spent)))
        # constants that the user gave stand; what was measured before the first step was measured once
        if self.config.cost is None:
            self.learner.add(range(self.world.size), self.costs, step, result.pass_seconds, result.pass_waits)
        beyond = statistics.median(self.overheads) if self.overheads else self.correction.seconds_per_step
        self.correction = self.learner.correction(range(self.world.size), beyond)

    def _trainer_state(self, batch: Batch) -> dict[str, Any]:
        schedule = self.trainer.schedule
        return {
            "step": self.done,
            "sampler": self.trainer.sampler.state_after(batch),
            "schedule": schedule.state_dict() if schedule is not None else None,
        }

    def _finish(self) -> None:
        """The last checkpoint."""
        self._progress.clear()
        if self.losses and not (self.config.checkpoint_every and self.done % self.config.checkpoint_every == 0):
            self.checkpoints.save(self.done, self.trainer.model, self.optimizer, self.state)
        self.checkpoints.wait()
        if self.stopped is not None:
            self._say(
                f"stopped by signal {self.stopped} after step {self.done}; the state is saved in {self.path}: "
                "resume continues it"
            )

    def _write_trace(self) -> None:
        recorder = self.world.recorder
        everyone = self.world.gather((recorder.spans, recorder.dropped))
        if self.directory:
            self.directory.trace({r: spans for r, (spans, _) in enumerate(everyone)}, sum(d for _, d in everyone))

    def _trace_of_a_failure(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        """Rank 0's own spans, when the others can't be asked."""
        if kind is not None and self.directory and self.directory.started:
            with suppress(UserError):
                self.directory.trace({0: self.world.recorder.spans}, self.world.recorder.dropped)
        return False

    def _blame(self, number: int, prepared: Prepared, result: StepResult) -> str:
        where = "no single sequence stands out"
        if result.non_finite:
            worst = result.non_finite[0]
            where = (
                f"rank {worst.rank} had {worst.loss} on sequence {prepared.batch.sequences[worst.sequence]} "
                f"of the data ({prepared.step.batch[worst.sequence]} tokens)"
            )
        return (
            f"the loss is {result.loss} at step {number}: {where}; look at that sequence, lower the learning rate or "
            f"clip_norm, then resume; {self._kept()}"
        )

    def _kept(self) -> str:
        self.checkpoints.wait()
        latest = self.world.once(self.checkpoints.latest)
        return f"the last good checkpoint is {latest.name}" if latest else "no checkpoint had been written yet"

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def _measured(metrics: StepMetrics, result: StepResult) -> dict[str, Any]:
    return {
        "seconds": metrics.measured_seconds,
        "busy_seconds": list(result.busy_seconds),
        "passes": [
            {
                "position": position,
                "rank": rank,
                "seconds": seconds,
                "waited_seconds": result.pass_waits[rank, position],
                "sent_bytes": result.pass_bytes[rank, position],
            }
            for (rank, position), seconds in result.pass_seconds.items()
        ],
        "plan_wait_seconds": metrics.plan_wait_seconds,
    }
