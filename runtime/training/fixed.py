"""The parts of a job whose ranks stay, put together."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from heteromesh.comm.session import Fixed
from heteromesh.comm.subset import join_subset
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.pass_buffers import unexpand
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.participation.told import numbered, working_in
from heteromesh.planner.participation.working import WorkingRanks, working_costs
from heteromesh.planner.plan import Plan
from heteromesh.planner.stages.json import stages_of
from heteromesh.runtime.hooks.api import TrainingReport
from heteromesh.runtime.hooks.calls import HookCalls
from heteromesh.runtime.hooks.console import Console
from heteromesh.runtime.hooks.memory import MemoryRecord
from heteromesh.runtime.hooks.records import RunRecords
from heteromesh.runtime.memory.decision import decide
from heteromesh.runtime.process.interrupt import Interrupt
from heteromesh.runtime.process.peers import SILENCE_SECONDS, PeerWatch
from heteromesh.runtime.records.checkpoint import shapes_of
from heteromesh.runtime.records.writer import CheckpointWriter
from heteromesh.runtime.training.build import build_cluster, build_plan, cluster_path, plan_path
from heteromesh.runtime.training.consistency import check_equal, job_facts
from heteromesh.runtime.training.job import Job
from heteromesh.runtime.training.job_check import check_precision
from heteromesh.runtime.training.loop import TrainingLoop
from heteromesh.runtime.training.modes.api import Mode
from heteromesh.runtime.training.modes.layer_by_layer import LayerByLayer
from heteromesh.runtime.training.modes.stages import Stages
from heteromesh.runtime.training.modes.whole_model import WholeModel
from heteromesh.runtime.training.progress import TrainingProgress, scale_of
from heteromesh.runtime.training.step import StepParts, TrainStep
from heteromesh.runtime.training.transactions import End, Evaluate, Save
from heteromesh.runtime.work.participation import told, working_ranks


class FixedJob:
    """One call of `Trainer.fit` in a world that stays. Everything it opens is closed by `stack`."""

    def __init__(self, job: Job, world: World, stack: ExitStack) -> None:
        self.job, self.everyone, self.world, self._stack = job, world, world, stack
        self._asked_shards = job.config.shard_weights
        config = job.config
        self.progress = TrainingProgress(last=config.max_steps, begun=True, scale=scale_of(config))
        self.interrupt = stack.enter_context(Interrupt())
        limit = min(SILENCE_SECONDS, config.timeout_seconds)
        stack.enter_context(PeerWatch(world, limit, self._hint))
        check_equal(world, lambda: job_facts(job, world.size))
        check_precision(job, world)
        self.cluster: Cluster = build_cluster(config, world.size)
        self.plan: Plan | None = world.once(lambda: build_plan(config, self.cluster))
        self.console = Console(config.max_steps, config.print_plans, str(config.run_dir))
        self.records = self._records()
        self.chosen: WorkingRanks | None = None
        self._shapes = shapes_of(job.model)
        self._open_mode()
        if self.works:
            self._begin()

    def _open_mode(self) -> None:
        """Makes the parts of a step, on all ranks or on those alone that get work."""
        self.works = True
        ranks = working_in(self.plan) if self.plan is not None and self.job.config.idle_hosts else None
        costs: Costs | None = None
        if ranks is None:
            modes = self._stack.enter_context(ExitStack())
            self.mode: Mode = self._mode(modes)
            costs = self.mode.measure() if self._may_leave_hosts_out() else None
            if costs is None or (ranks := self._choose(costs)) is None:
                return
            modes.close()
        else:
            self.plan = self.plan and numbered(self.plan, ranks)
        timeout = timedelta(seconds=self.job.config.timeout_seconds)
        part = self._stack.enter_context(join_subset(self.everyone, ranks, timeout))
        self.works = part is not None
        if part is None:
            vars(self).pop("mode", None)  # weights that were dealt out to this rank to be measured
        else:
            self.world = self.records.together = part
            self.cluster = self.cluster.subset(ranks)
            self.mode = self._mode(self._stack, costs and working_costs(costs, ranks))

    def _choose(self, costs: Costs) -> tuple[int, ...] | None:
        """Returns the ranks that work, as costs of all ranks have it; None: all."""
        job, cluster, buckets = self.job, self.cluster, self.mode.exchange.buckets
        chosen = self.everyone.once(
            lambda: working_ranks(job.sampler, cluster, costs, buckets, job.config.plan_seconds)
        )
        if len(chosen.ranks) == self.everyone.size:
            return None
        self.chosen = chosen
        if self.everyone.rank == 0:
            self.console.say(told(chosen, cluster))
        return tuple(chosen.ranks)

    def _may_leave_hosts_out(self) -> bool:
        """Returns whether a cluster file describes several hosts, and neither a plan nor the user says who works."""
        config = self.job.config
        described = cluster_path(config) is not None and len(self.cluster.hosts) > 1
        return config.idle_hosts and described and self.plan is None

    def _begin(self) -> None:
        """Continues an earlier run, where that is wanted, and gets ready for the next step."""
        config, world = self.job.config, self.world
        self.writer = self._writer()
        wanted = config.resume == "auto" or self.records.restarted
        if config.resume is True or (wanted and self.writer.holds_any()):
            self._resume()
        self.measured = self.mode.start(self.progress.done)
        world.recorder.spans.clear()
        if world.rank == 0:
            self.records.open(world.members, self.progress.done)
            for line in (self.mode.offload.told(config.run_dir), self.job.reader.facts.warning()):
                if line:
                    self.console.say(line)

    def run(self) -> TrainingReport:
        """Trains, saves, compares; on a rank without work it waits, and takes the trained weights."""
        report = self._train() if self.works else None
        if self.world.size == self.everyone.size and self.works:
            assert report is not None
            return report
        shared: TrainingReport = self.everyone.broadcast(report)
        model = self.job.model
        if self.everyone.broadcast(self.works and self.mode.dealt_out):
            return shared
        if self.works:
            self.mode.state.weights_ready()
        else:
            self.job.initial.fill(torch.device("cpu"))
            unexpand(model)
        self.everyone.broadcast_tensors((*model.parameters(), *model.buffers()))
        return shared

    def _train(self) -> TrainingReport:
        world, progress = self.world, self.progress
        session = Fixed(world)
        mode = self.mode
        memory = MemoryRecord(world, mode.memory, self.console.say, self.records.memory, mode.offload.moments)
        hooks = HookCalls([self.records, self.console, memory, *self.measured], self.job.hooks, session.busy)
        loop = TrainingLoop(session, progress, self.interrupt, hooks, str(self.job.config.run_dir))
        state = mode.state
        work = mode.work(progress.done)
        parts = StepParts(work=work, engine=mode.engine, exchange=mode.exchange, state=state, buffers=mode.buffers)
        step = TrainStep(
            self.job, progress, parts, asked=loop.asked, kept=self._kept, hooks=loop.step_committed, busy=session.busy
        )
        loop.transactions = [
            Evaluate(progress, state, self.job.model, hooks, mode.evaluate if mode.dealt_out else None),
            Save(progress, state, session, self.writer, hooks),
            End(progress, session, self.writer, hooks, loop.report),
            step,
        ]
        memory.begin()
        if world.rank == 0:
            self.console.begin()
        try:
            report = loop.run(step.start)
        finally:
            work.close()
        self.records.finished(report)
        return report if report.signal is not None else report.with_comparisons(mode.compare(self._asked))

    def _records(self) -> RunRecords:
        config, world = self.job.config, self.world
        records = RunRecords(Path(config.run_dir), world.recorder, self._resolved, resume=config.resume, together=world)
        world.once(records.create)
        self._stack.callback(records.close)
        self._stack.push(self._trace_of_a_failure)
        return records

    def _mode(self, stack: ExitStack, costs: Costs | None = None) -> Mode:
        """costs: of the world's ranks, where they have been measured."""
        job, world, plan = self.job, self.world, self.plan
        basis = stages_of(plan.layout, f"plan file {plan_path(job.config)}: layout") if plan else None
        if plan is None or basis is None:
            shard = self._shards_weights()
            job = self.job = replace(job, config=replace(job.config, shard_weights=shard))
            kind = LayerByLayer if shard else WholeModel
            return kind(job, world, self.cluster, plan, stack, costs)
        return Stages(job, world, self.cluster, plan, basis, stack)

    def _shards_weights(self) -> bool:
        """Returns whether the world's ranks have a part of the weights each, as the user or their memory wants it."""
        job, described = self.job, cluster_path(self.job.config) is not None
        config = replace(job.config, shard_weights=self._asked_shards)
        decision = decide(config, job.model, job.optimizer, self.world, self.cluster, described=described)
        if decision.told and self.world.rank == 0:
            self.console.say(decision.told)
        return decision.shard

    def _writer(self) -> CheckpointWriter:
        config = self.job.config
        writer = CheckpointWriter(
            Path(config.run_dir),
            self.mode.held,
            self.mode.state,
            lambda done, sampled: self.job.trainer_state(done, sampled, self.progress.scale),
            self.world.recorder,
            shapes=self._shapes,
            every=config.checkpoint_every,
            keep=config.keep_checkpoints,
            together=self.world,
            copied=not self.mode.is_tight,
        )
        self._stack.callback(writer.close)
        return writer

    def _resume(self) -> None:
        path, state = self.writer.resume(self.console.say if self.world.rank == 0 else lambda _: None)
        notes = self.job.load_trainer_state(state)
        self.progress.resume(state)
        if self.world.rank == 0:
            self.console.say("\n".join((f"resumed from {path} at step {state['step']}", *notes)))

    def _resolved(self, members: tuple[int, ...]) -> dict[str, Any]:
        return {
            "trainer": asdict(self.job.config),
            "ranks": self.world.size,
            "participation": asdict(self.chosen) if self.chosen is not None else None,
            "cluster": {"name": self.cluster.name, "fingerprint": self.cluster.fingerprint},
            "optimizer": self.job.described(),
            **self.mode.resolved(),
        }

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
