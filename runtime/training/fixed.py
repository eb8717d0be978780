"""The parts of a job whose ranks stay, put together."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heteromesh.comm.collectives.int8 import Int8Collectives
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.session import Fixed
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.owner import Replicated, StateOwner
from heteromesh.parallel.state.sharded import Sharded
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Plan
from heteromesh.runtime.engine.baselines import compare
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.hooks.api import TrainingReport
from heteromesh.runtime.hooks.calls import HookCalls
from heteromesh.runtime.hooks.console import Console
from heteromesh.runtime.hooks.cost_learning import CostLearning, FixedCosts
from heteromesh.runtime.hooks.recent import RecentSteps
from heteromesh.runtime.hooks.records import RunRecords
from heteromesh.runtime.process.interrupt import Interrupt
from heteromesh.runtime.process.peers import SILENCE_SECONDS, PeerWatch
from heteromesh.runtime.records.writer import CheckpointWriter
from heteromesh.runtime.training.build import (
    build_cluster,
    build_collectives,
    build_compression,
    build_costs,
    build_plan,
)
from heteromesh.runtime.training.consistency import check_equal, job_facts
from heteromesh.runtime.training.job import Job
from heteromesh.runtime.training.loop import TrainingLoop
from heteromesh.runtime.training.progress import TrainingProgress
from heteromesh.runtime.training.step import StepParts, TrainStep
from heteromesh.runtime.training.transactions import End, Evaluate, Save
from heteromesh.runtime.work.feed import PlanFeed
from heteromesh.runtime.work.plan_service import PlanService
from heteromesh.runtime.work.planned import Planned


class FixedJob:
    """One call of `Trainer.fit` in a world that stays. Everything it opens is closed by `stack`."""

    def __init__(self, job: Job, world: World, stack: ExitStack) -> None:
        self.job, self.world, self._stack = job, world, stack
        config = job.config
        self.progress = TrainingProgress(last=config.max_steps, begun=True)
        self.interrupt = stack.enter_context(Interrupt())
        limit = min(SILENCE_SECONDS, config.timeout_seconds)
        stack.enter_context(PeerWatch(world, limit, self._hint))
        check_equal(world, lambda: job_facts(job, world.size))
        self.cluster: Cluster = build_cluster(config, world.size)
        self.plan: Plan | None = world.once(lambda: build_plan(config, self.cluster))
        self.records = self._records()
        self.service = self._service()
        job.model.to(world.device)
        world.broadcast_tensors((*job.model.parameters(), *job.model.buffers()))
        sharded = config.shard_optimizer and world.size > 1
        self.engine = PassMajor(
            job.model,
            seed=config.seed,
            autocast=config.autocast,
            checkpoint_activations=config.checkpoint_activations,
        )
        stack.callback(self.engine.close)
        self.exchange = GradientReducer(job.model.parameters(), scatter=sharded)
        stack.callback(self.exchange.close)
        self.executor = StepExecutor.of(self.engine, self.exchange, world, scatter=sharded)
        world.collectives = stack.enter_context(build_collectives(config, self.cluster, job.optimizer, world))
        self.state: StateOwner = self._state(sharded)
        stack.callback(self.state.close)
        self.writer = self._writer()
        self.console = Console(config.max_steps, config.print_plans, str(config.run_dir))
        if config.resume:
            self._resume()
        self.costs = self._costs()
        self.recent = RecentSteps(config.compare_batches)

    def run(self) -> TrainingReport:
        """Trains, saves, compares."""
        world, progress = self.world, self.progress
        session = Fixed(world)
        ours = [self.recent, self.records, self.console, self.costs]
        hooks = HookCalls(ours, self.job.hooks, session.busy)
        loop = TrainingLoop(session, progress, self.interrupt, hooks, str(self.job.config.run_dir))
        work = self._work()
        parts = StepParts(work=work, engine=self.engine, exchange=self.exchange, state=self.state)
        step = TrainStep(self.job, progress, parts, asked=loop.asked, kept=self._kept, hooks=loop.step_committed)
        loop.transactions = [
            Evaluate(progress, self.state, self.job.model, hooks),
            Save(progress, self.state, session, self.writer, hooks),
            End(progress, session, self.writer, hooks, loop.report),
            step,
        ]
        if world.rank == 0:
            self.console.begin()
        try:
            report = loop.run(step.start)
        finally:
            work.close()
        return report.with_comparisons(self._compare(report))

    def _records(self) -> RunRecords:
        config, world = self.job.config, self.world
        records = RunRecords(Path(config.run_dir), world.recorder, self._resolved, resume=config.resume, together=world)
        world.once(records.create)
        self._stack.callback(records.close)
        self._stack.push(self._trace_of_a_failure)
        return records

    def _service(self) -> PlanService | None:
        if self.world.rank != 0:
            return None
        service = PlanService(self.job.config.plan_seconds, self.plan)
        self._stack.callback(service.close)
        service.start()  # it starts up while the model is measured
        return service

    def _state(self, sharded: bool) -> StateOwner:
        job = self.job
        if sharded:
            return Sharded(job.optimizer, job.model, self.exchange.buckets, self.world)
        buckets = self.exchange.buckets if self.world.size > 1 else ()
        return Replicated(job.optimizer, job.model, buckets)

    def _writer(self) -> CheckpointWriter:
        config = self.job.config
        writer = CheckpointWriter(
            Path(config.run_dir),
            self.job.model,
            self.state,
            self.job.trainer_state,
            self.world.recorder,
            every=config.checkpoint_every,
            keep=config.keep_checkpoints,
            together=self.world,
        )
        self._stack.callback(writer.close)
        return writer

    def _resume(self) -> None:
        path, state = self.writer.resume()
        self.job.load_trainer_state(state)
        self.progress.done = self.progress.saved = self.progress.evaluated = int(state["step"])
        self.progress.sampled = state["sampler"]
        if self.world.rank == 0:
            self.console.say(f"resumed from {path} at step {state['step']}")

    def _costs(self) -> CostLearning:
        """Costs, compression, config.json."""
        config, world = self.job.config, self.world
        self.base: Costs = build_costs(config, self.cluster, self.executor, self.job.reader)
        world.collectives = self._stack.enter_context(
            build_compression(config, world, self.exchange.buckets, self.base)
        )
        world.recorder.spans.clear()
        costs = CostLearning(
            FixedCosts(self.base),
            learns=config.cost is None,
            # on a CUDA device nobody waits for an exchange on the host: a split pass's seconds hold what it waited
            waits_known=world.device.type == "cpu",
            seconds_per_step=self.base.seconds_per_step,
        )
        if world.rank == 0:
            self.records.open(world.members, self.progress.done)
        return costs

    def _work(self) -> Planned:
        job, config = self.job, self.job.config
        feed = PlanFeed(
            self.world,
            job.sampler,
            job.reader,
            self.service,
            self.costs,
            first=self.progress.done,
            last=config.max_steps,
            ahead=config.plan_ahead,
        )
        return Planned(job.sampler, job.reader, self.service, self.costs, feed)

    def _resolved(self, members: tuple[int, ...]) -> dict[str, Any]:
        compressed = isinstance(self.world.collectives, Int8Collectives)
        return {
            "trainer": asdict(self.job.config),
            "ranks": self.world.size,
            "cluster": {"name": self.cluster.name, "fingerprint": self.cluster.fingerprint},
            "costs": costs_to_json(self.base),
            "gradient_compression": "int8" if compressed else "none",
        }

    def _compare(self, report: TrainingReport) -> tuple[Any, ...]:
        config, world = self.job.config, self.world
        if not config.compare_batches or report.signal is not None:
            return ()
        costs = world.once(lambda: self.costs.correction(world.members)).applied(self.base)
        self.executor.speeds = costs.speeds
        return compare(self.executor, self.job.reader, self.recent.steps, costs, self._asked)

    def _asked(self) -> int | None:
        """Returns the signal that any rank was sent; equal on every rank."""
        return max(self.world.gather(self.interrupt.signal or 0)) or None

    def _hint(self) -> str:
        """Says what to do to a user whose run was cut off from other ranks, so without asking them."""
        every = self.job.config.checkpoint_every
        if self.job.config.resume or (every and self.progress.done >= every):
            path = self.job.config.run_dir
            return f"start the run again with resume=True: it continues at the last whole checkpoint in {path}"
        return "start the run anew (no checkpoint had been written; checkpoint_every says how often to)"

    def _kept(self) -> str:
        self.writer.wait()
        latest = self.world.once(self.writer.latest)
        return f"the last good checkpoint is {latest.name}" if latest else "no checkpoint had been written yet"

    def _trace_of_a_failure(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        if kind is not None:
            with suppress(UserError):
                self.records.trace_of_a_failure()
        return False
