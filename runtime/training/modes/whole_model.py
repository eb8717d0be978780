"""The model on every rank; the optimizer's state too, or sharded, or on lower tiers of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.parallel.model.pass_buffers import unexpand
from heteromesh.parallel.state.offloaded import Offloaded
from heteromesh.parallel.state.owner import Replicated, StateOwner
from heteromesh.parallel.state.sharded import Sharded
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes
from heteromesh.planner.plan import Plan
from heteromesh.runtime.engine.baselines import EvenSplit, compare
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.engine.token_bytes import pass_token_bytes
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.hooks.cost_learning import CostLearning, FixedCosts
from heteromesh.runtime.hooks.recent import RecentSteps
from heteromesh.runtime.memory.offload import on_all
from heteromesh.runtime.memory.replicated import ReplicatedJob, hold_whole
from heteromesh.runtime.memory.shares import OwnedBytes, owned_bytes
from heteromesh.runtime.memory.sizes import job_ranks, separation_of
from heteromesh.runtime.training.build import build_collectives, build_compression, build_costs, cluster_path
from heteromesh.runtime.training.job import Job
from heteromesh.runtime.training.modes.api import Mode, compression_of
from heteromesh.runtime.training.trial import learn_buffers, try_model
from heteromesh.runtime.work.feed import PlanFeed
from heteromesh.runtime.work.plan_service import PlanService
from heteromesh.runtime.work.planned import Planned
from heteromesh.runtime.work.source import WorkSource

_FINE = 1 << 30
"""Elements by which fractions are told."""


class WholeModel(Mode):
    """The model on every rank; the optimizer's state too, or sharded."""

    _whole: ReplicatedJob | None = None
    """What ranks with whole weights hold."""

    def __init__(
        self, job: Job, world: World, cluster: Cluster, plan: Plan | None, stack: ExitStack, costs: Costs | None = None
    ) -> None:
        """costs: of these ranks, where they have been measured."""
        self._job, self._world, self._cluster, self._stack = job, world, cluster, stack
        self._base = costs
        self._separation = separation_of(job.optimizer)
        config = job.config
        self._service = self._open_service(plan)
        sharded = config.shards_state and world.size > 1
        self._fill(sharded)
        self.held = job.model
        self.engine = self._engine()
        stack.callback(self.engine.close)
        world.once(lambda: try_model(job.model, job.reader, job.loss))
        self.exchange = self._exchange(sharded)
        stack.callback(self.exchange.close)
        self._executor = StepExecutor.of(self.engine, self.exchange, world, scatter=sharded)
        self.buffers = learn_buffers(self.engine, job.reader, world)
        limits = self._limits(sharded)
        world.collectives = stack.enter_context(build_collectives(config, cluster, job.optimizer, world, limits))
        self.state = self._state(sharded)
        stack.callback(self.state.close)
        self._recent = RecentSteps(config.compare_batches)

    def measure(self) -> Costs:
        """See Mode."""
        if self._base is None:
            self._base = build_costs(self._job.config, self._cluster, self._executor, self._job.reader)
        return self._base

    def start(self, done: int) -> Sequence[Hook]:
        """See Mode."""
        config, world, base = self._job.config, self._world, self._bounded(self.measure())
        if self._whole is not None and not self.offload.is_used:
            ranks = tuple(job_ranks(self._cluster, world, self._job.model, described=bool(cluster_path(config))))
            self._whole = replace(self._whole, ranks=ranks, shares=tuple(self._shares()))
        world.collectives = self._stack.enter_context(build_compression(config, world, self.exchange.buckets, base))
        self._costs = CostLearning(
            FixedCosts(base),
            learns=config.cost is None,
            # on a CUDA device nobody waits for an exchange on the host: a split pass's seconds hold what it waited
            waits_known=world.device.type == "cpu",
            seconds_per_step=base.seconds_per_step,
        )
        return self._recent, self._costs

    def work(self, done: int) -> WorkSource:
        """See Mode."""
        job, config = self._job, self._job.config
        feed = PlanFeed(
            self._world,
            job.sampler,
            job.reader,
            self._service,
            self._costs,
            first=done,
            last=config.max_steps,
            ahead=config.plan_ahead,
        )
        return Planned(job.sampler, job.reader, self._service, self._costs, feed)

    def resolved(self) -> dict[str, Any]:
        """See Mode."""
        costs = costs_to_json(self._bounded(self.measure()))
        return {"costs": costs, "gradient_compression": compression_of(self._world), **self.offload.resolved()}

    def memory(self, of_pass: Sequence[float], of_step: Sequence[float]) -> tuple[MemoryByKind, ...]:
        """See Mode."""
        return () if self._whole is None else self._whole.memory(of_pass, of_step)

    def compare(self, asked: Callable[[], int | None]) -> tuple[EvenSplit, ...]:
        """See Mode."""
        if not self._job.config.compare_batches:
            return ()
        world = self._world
        costs = world.once(lambda: self._costs.correction(world.members)).applied(self.measure())
        self._executor.speeds = costs.speeds
        return compare(self._executor, self._job.reader, self._recent.steps, costs, asked)

    def _owned_bytes(self) -> list[OwnedBytes]:
        """Returns by rank what it owns where parameters have one owner each; nothing where they are cut anywhere."""
        collectives = self._world.collectives
        return (
            [] if collectives is None else owned_bytes(self.exchange.buckets, collectives, self._separation.state_bytes)
        )

    def _fill(self, sharded: bool) -> None:
        """Gives the model its first weights, the same on all ranks."""
        model, world = self._job.model, self._world
        self._job.initial.fill(world.device)
        unexpand(model)
        model.to(world.device)
        world.broadcast_tensors((*model.parameters(), *model.buffers()))

    def _open_service(self, plan: Plan | None) -> PlanService | None:
        if self._world.rank != 0:
            return None
        service = PlanService(self._job.config.plan_seconds, plan)
        self._stack.callback(service.close)
        service.start()  # it starts up while the model is measured
        return service

    def _engine(self) -> PassMajor:
        job, config = self._job, self._job.config
        return PassMajor(
            job.model,
            seed=config.seed,
            autocast=config.autocast,
            checkpoint_activations=config.checkpoint_activations,
            loss=job.loss,
        )

    def _limits(self, sharded: bool) -> Sequence[float] | None:
        """Returns by rank the largest fraction of what is dealt out that it may own; None: as memory has it."""
        reader, device = self._job.reader, self._world.device
        engine = self.engine
        assert isinstance(engine, PassMajor)
        self._tokens: TokenBytes = self._world.once(lambda: pass_token_bytes(engine, reader, device))
        return None

    def _bounded(self, costs: Costs) -> Costs:
        """Returns the costs within what ranks can hold in a step."""
        return costs if self._whole is None else self._whole.bounded(costs, self._job.config)

    def _exchange(self, sharded: bool) -> GradientReducer:
        return GradientReducer(self._job.model.parameters(), scatter=sharded)

    def _state(self, sharded: bool) -> StateOwner:
        job, world = self._job, self._world
        self._whole = hold_whole(
            job.config,
            job.model,
            job.optimizer,
            world,
            self._cluster,
            described=bool(cluster_path(job.config)),
            shares=self._shares(),
            tokens=self._tokens,
            longest=max(job.reader.lengths),
        )
        self.offload, self.is_tight = self._whole.offload, not self._whole.copied
        optimizer = self._placed()
        if sharded:
            return on_all(world, lambda: Sharded(optimizer, job.model, self.exchange.buckets, world))
        buckets = self.exchange.buckets if world.size > 1 else ()
        kind = Replicated if optimizer is job.optimizer else Offloaded
        return on_all(world, lambda: kind(optimizer, job.model, buckets))

    def _placed(self) -> torch.optim.Optimizer:
        """Returns the optimizer, with its state where there is memory for it."""
        return self.offload.optimizer(self._job.optimizer, self._world, self._cluster, self._job.config, self._stack)

    def _shares(self) -> list[float]:
        """Returns by rank its fraction of the optimizer's state."""
        collectives = self._world.collectives
        if not self._job.config.shards_state or collectives is None:
            return [1.0] * self._world.size
        owned = [each.state for each in self._owned_bytes()]
        if whole := sum(owned):
            return [each / whole for each in owned]
        return [(high - low) / _FINE for low, high in pairwise(collectives.bounds(_FINE))]
