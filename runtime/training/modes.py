"""How a job whose ranks stay can train: the whole model on every rank, or the model in pipeline stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from heteromesh.comm.collectives.int8 import Int8Collectives
from heteromesh.comm.gradients.exchange import GradientExchange
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.initial.stand_ins import GradientSketches
from heteromesh.parallel.layer_major.schedule import LayerOrder
from heteromesh.parallel.model.call import is_compiled
from heteromesh.parallel.model.pass_buffers import PassBuffers, unexpand
from heteromesh.parallel.pipeline.check import check_stages
from heteromesh.parallel.pipeline.engine import StageRunner, check_placement
from heteromesh.parallel.pipeline.exchange import StageExchange
from heteromesh.parallel.pipeline.owner import StageOwner
from heteromesh.parallel.state.owner import Replicated, StateOwner
from heteromesh.parallel.state.sharded import Sharded
from heteromesh.parallel.state.sharded_weights import ShardedWeights
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.json import costs_from_json, costs_to_json
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.ownership.in_job import replicated_in_job
from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes
from heteromesh.planner.participation.in_job import JobTokens
from heteromesh.planner.plan import Plan
from heteromesh.planner.stages.json import Basis
from heteromesh.runtime.engine.api import Engine
from heteromesh.runtime.engine.baselines import EvenSplit, compare
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.engine.layer_major import LayerMajor
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.engine.pipeline import Pipeline
from heteromesh.runtime.engine.token_bytes import layer_token_bytes, pass_token_bytes
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.hooks.cost_learning import CostLearning, FixedCosts
from heteromesh.runtime.hooks.recent import RecentSteps
from heteromesh.runtime.hooks.whole import Gathered, Settled, WholeStages
from heteromesh.runtime.memory.ownership import OwnedJob, own_in_job, run_order
from heteromesh.runtime.memory.shares import OwnedBytes, is_dealt, owned_bytes
from heteromesh.runtime.memory.sizes import job_model, job_ranks, separation_of
from heteromesh.runtime.process.memory import give_back_at_once
from heteromesh.runtime.training.build import build_collectives, build_compression, build_costs, cluster_path
from heteromesh.runtime.training.job import Job, name_of
from heteromesh.runtime.training.layer_trial import layer_reducer, try_layers, working_weights
from heteromesh.runtime.training.trial import learn_buffers, try_model
from heteromesh.runtime.work.feed import PlanFeed
from heteromesh.runtime.work.packed import PackedPipeline, work_of
from heteromesh.runtime.work.plan_service import PlanService
from heteromesh.runtime.work.planned import Planned
from heteromesh.runtime.work.source import WorkSource

T = TypeVar("T")

_FINE = 1 << 30
"""Elements by which fractions are told."""


class Mode(ABC):
    """The parts of a step that depend on where the model is. What it opens is closed by the stack that it is given."""

    engine: Engine
    exchange: GradientExchange
    state: StateOwner
    buffers: PassBuffers
    held: nn.Module
    """What this rank writes into checkpoints: the model, or its part of it."""
    is_tight: bool = False
    """Whether memory is planned for: then nothing is held that need not be."""

    def measure(self) -> Costs | None:
        """Measures what passes cost on this world's ranks; None where the plan has fixed who works."""
        return None

    @property
    def dealt_out(self) -> bool:
        """Whether no rank ever has the whole model, at the end neither."""
        return False

    def evaluate(self, act: Callable[[], T], world: World) -> T:
        """Returns what an evaluation finds, of a model that is dealt out."""
        raise NotImplementedError("a model that is whole is evaluated as it is")

    @abstractmethod
    def start(self, done: int) -> Sequence[Hook]:
        """Prepares for step `done` + 1; returns hooks."""

    @abstractmethod
    def work(self, done: int) -> WorkSource:
        """Returns where the work comes from, after `done` steps."""

    @abstractmethod
    def resolved(self) -> dict[str, Any]:
        """Returns what config.json has of it."""

    def memory(self, of_pass: Sequence[float], of_step: Sequence[float]) -> tuple[MemoryByKind, ...]:
        """Returns by rank what it is predicted to hold at the most in a step of so many tokens, in its largest pass and
        in all, by rank; empty where that isn't known. Known from `start` on."""
        return ()

    def compare(self, asked: Callable[[], int | None]) -> tuple[EvenSplit, ...]:
        """Compares the last steps with the static layouts, where the user wants it."""
        return ()


class WholeModel(Mode):
    """The model on every rank; the optimizer's state too, or sharded."""

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
        self._ranks = job_ranks(self._cluster, world, self._job.model, described=bool(cluster_path(config)))
        self._sizes = job_model(self._job.model, (), self._job.optimizer)
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
        return {"costs": costs, "gradient_compression": _compression(self._world)}

    def memory(self, of_pass: Sequence[float], of_step: Sequence[float]) -> tuple[MemoryByKind, ...]:
        """See Mode."""
        size, collectives, shards = self._world.size, self._world.collectives, [1.0] * self._world.size
        if self._job.config.shards_state and collectives is not None:
            shards = [(high - low) / _FINE for low, high in pairwise(collectives.bounds(_FINE))]
            if owned := self._owned_bytes():
                whole = sum(each.state for each in owned)
                shards = [each.state / whole for each in owned] if whole else shards
        return tuple(
            replicated_in_job(
                self._sizes,
                rank,
                optimizer=f,
                pass_bytes=self._tokens.per_pass * p + self._tokens.per_step * t,
                ranks=size,
                copied=True,
            )
            for rank, f, p, t in zip(self._ranks, shards, of_pass, of_step, strict=True)
        )

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
        buckets, collectives = self.exchange.buckets, self._world.collectives
        if collectives is None or not is_dealt(buckets):
            return []
        return owned_bytes(buckets, collectives, self._separation.state_bytes)

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
        return costs

    def _exchange(self, sharded: bool) -> GradientReducer:
        return GradientReducer(self._job.model.parameters(), scatter=sharded)

    def _state(self, sharded: bool) -> StateOwner:
        job = self._job
        if sharded:
            return Sharded(job.optimizer, job.model, self.exchange.buckets, self._world)
        buckets = self.exchange.buckets if self._world.size > 1 else ()
        return Replicated(job.optimizer, job.model, buckets)


class LayerByLayer(WholeModel):
    """The weights dealt out too: a layer is whole on every rank while all passes go through it.

    The model is whole until it is dealt out, as it is tried and measured pass by pass. One that had no weights at the
    start never is: others stand in for its layers' until then, and each rank reads its own part of its weights.
    """

    engine: LayerMajor
    _owned: OwnedJob | None = None
    _sketches: GradientSketches | None = None
    """Of gradients, while weights have stand-ins."""

    @property
    def dealt_out(self) -> bool:
        """See Mode."""
        return self._job.initial.on_meta and isinstance(self.state, ShardedWeights)

    def evaluate(self, act: Callable[[], T], world: World) -> T:
        """See Mode."""
        return self.engine.forwards_of(act, world)

    def start(self, done: int) -> Sequence[Hook]:
        """See Mode."""
        hooks, state = super().start(done), self.state
        if not isinstance(state, ShardedWeights):
            self.engine.attach(self._world.device, self._order)
            return hooks
        self.engine.attach(self._world.device, self._order, state, self._kept_layers)
        state.begin()  # what isn't kept is given back before the first step, not in it
        return (*hooks, Settled(state) if self.dealt_out else Gathered(state))

    def _kept_layers(self, of_pass: int, of_step: int) -> int:
        """Returns of how many layers this rank's activations are kept in such a step."""
        owned = self._owned
        return owned.kept_layers(self._world.rank, of_pass, of_step) if owned is not None else 0

    def _fill(self, sharded: bool) -> None:
        job, world = self._job, self._world
        if not (sharded and job.initial.on_meta):
            super()._fill(sharded)
            return
        self._sketches = job.initial.stand_in(world.device)
        self._stack.callback(self._sketches.close)
        unexpand(job.model)
        job.model.to(world.device)
        world.broadcast_tensors((*job.initial.own, *job.model.buffers()))

    def _engine(self) -> LayerMajor:
        job, config = self._job, self._job.config
        return LayerMajor(job.model, seed=config.seed, autocast=config.autocast, loss=job.loss)

    def _limits(self, sharded: bool) -> Sequence[float] | None:
        """Plans who owns what, once it is measured what passes take."""
        job, world, own = self._job, self._world, self.engine.own_parameters
        if not sharded:
            return None
        costs, order = self.measure(), run_order(self._order, len(own))
        self._owned = own_in_job(
            world,
            self._cluster,
            costs,
            job_model(job.model, [own[index] for index in order], job.optimizer, self._working),
            job_ranks(self._cluster, world, job.model, described=bool(cluster_path(job.config))),
            JobTokens(step=job.config.batch_tokens, longest=max(job.reader.lengths), bytes=self._tokens),
            order,
        )
        self.is_tight = bool(self._owned.plan.step_tokens)
        if self.is_tight:
            give_back_at_once(world.device)
        return self._owned.plan.fractions

    def _bounded(self, costs: Costs) -> Costs:
        if self._owned is None:
            return costs
        return self._owned.bounded(costs, self._cluster, given=self._job.config.tokens_per_device is not None)

    def resolved(self) -> dict[str, Any]:
        """See Mode."""
        return super().resolved() | {"ownership": self._owned.resolved() if self._owned is not None else None}

    def memory(self, of_pass: Sequence[float], of_step: Sequence[float]) -> tuple[MemoryByKind, ...]:
        """See Mode."""
        if self._owned is None:
            return super().memory(of_pass, of_step)
        return self._owned.memory(of_pass, of_step)

    def _exchange(self, sharded: bool) -> GradientReducer:
        engine, reader, device = self.engine, self._job.reader, self._world.device
        self._order: LayerOrder = self._world.once(lambda: try_layers(engine, reader, device, self._sketches))
        self._working = self._working_weights() if sharded else {}
        self._tokens = self._world.once(lambda: self._token_bytes())
        if not self._order.mappings:
            engine.recompute()
        return layer_reducer(engine, self._order, self._working, scatter=sharded)

    def _token_bytes(self) -> TokenBytes:
        tokens = layer_token_bytes(self.engine, self._job.reader, self._world.device, self._order)
        # autocast's copies of weights, which a graph would hold, are not counted; compiled layers make their own graphs
        copies = self.engine.autocast is not None and not self._working
        return replace(tokens, by_layer=()) if copies or is_compiled(self._job.model) else tokens

    def _working_weights(self) -> dict[nn.Parameter, torch.dtype]:
        """Returns the weights that are gathered in the dtype to which autocast casts them anyway."""
        engine, reader, device = self.engine, self._job.reader, self._world.device
        dtype = engine.autocast
        if dtype is None:
            return {}
        parameters, order = list(engine.model.parameters()), self._order
        found = self._world.once(lambda: working_weights(engine, reader, device, order, self._sketches))
        return {parameters[i]: dtype for i in found}

    def _state(self, sharded: bool) -> StateOwner:
        if not sharded:
            return super()._state(sharded)
        self.measure()  # while weights, or what stands in for them, are here
        job, initial, source = self._job, self._job.initial, None
        if self._sketches is not None:
            self._sketches.close()
            source = initial
        assert self._owned is not None
        state = ShardedWeights(
            job.optimizer,
            job.model,
            self.exchange.buckets,
            self._world,
            self.engine.own_parameters,
            resident=self._owned.resident,
            working=self._working,
            source=source,
        )
        initial.forget()
        if owned := self._owned_bytes():
            self._owned = self._owned.dealt(owned)
        return state


class Stages(Mode):
    """The model in the stages of a plan, one a rank, and replicas of them."""

    def __init__(self, job: Job, world: World, cluster: Cluster, plan: Plan, basis: Basis, stack: ExitStack) -> None:
        self._job, self._world, self._cluster, self._plan, self._basis = job, world, cluster, plan, basis
        config, placement = job.config, basis.placement
        if job.loss is not None:
            raise UserError(
                f"loss is {name_of(job.loss)} and the plan trains the model in pipeline stages, where only the next "
                "token's cross-entropy is known: leave loss= out, or train without this plan file"
            )
        check_placement(job.model, placement, world.size)
        job.initial.fill(torch.device("cpu"))
        unexpand(job.model)
        world.broadcast_tensors((*job.model.parameters(), *job.model.buffers()))
        world.once(lambda: try_model(job.model, job.reader, None))
        sample = torch.from_numpy(job.reader.sample_tokens(8)).repeat(8)
        world.once(lambda: check_stages(job.model, placement, sample))
        self._runner = StageRunner(
            job.model,
            world,
            placement,
            seed=config.seed,
            autocast=config.autocast,
            checkpoint_activations=config.checkpoint_activations,
        )
        self.held, self.engine = self._runner.model, Pipeline(self._runner)
        self.buffers = PassBuffers(self._runner.model)
        stack.callback(self.engine.close)
        self.exchange = StageExchange(self._runner)
        stack.callback(self.exchange.close)
        self._costs = self._load_costs()
        peers = self._runner.groups.peers
        own = cluster.subset(peers.members)
        peers.collectives = stack.enter_context(build_collectives(config, own, job.optimizer, peers))
        peers.collectives = stack.enter_context(build_compression(config, peers, self.exchange.buckets, self._costs))
        self.state = StageOwner(job.optimizer, job.model, self._runner, self.exchange.buckets)
        stack.callback(self.state.close)

    def start(self, done: int) -> Sequence[Hook]:
        """See Mode."""
        return (WholeStages(self.state, self._runner),)

    def work(self, done: int) -> WorkSource:
        """See Mode."""
        costs, batch = self._costs, self._plan.steps[0].batch
        pairs = costs.seconds_per_token2 / costs.seconds_per_token
        basis, first = self._basis, self._basis.placement.stages[0]
        work = work_of(batch, pairs)
        stage = first.layers * basis.work.layer_seconds * basis.work.micro_batches / work
        return PackedPipeline(
            self._job.sampler,
            self._job.reader,
            basis.placement,
            self._runner.entry,
            pairs_per_token=pairs,
            tokens=self._job.config.tokens_per_device,
            step_seconds=basis.seconds / work,
            pass_seconds={rank: stage / costs.speeds[rank] for rank in first.ranks},
        )

    def resolved(self) -> dict[str, Any]:
        """See Mode."""
        return {
            "costs": costs_to_json(self._costs),
            "gradient_compression": _compression(self._runner.groups.peers),
            "stages": self._plan.layout["placement"]["stages"],
            "micro_batches": self._plan.layout["placement"]["micro_batches"],
        }

    def _load_costs(self) -> Costs:
        config = self._job.config
        if config.cost is not None:
            return bind(load_constants(Path(config.cost)), self._cluster)
        return costs_from_json(self._plan.layout["costs"], "layout.costs")


def _compression(world: World) -> str:
    return "int8" if isinstance(world.collectives, Int8Collectives) else "none"
