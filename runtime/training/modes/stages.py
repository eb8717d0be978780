"""The model in the pipeline stages of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.pass_buffers import PassBuffers, unexpand
from heteromesh.parallel.pipeline.check import check_stages
from heteromesh.parallel.pipeline.engine import StageRunner, check_placement
from heteromesh.parallel.pipeline.exchange import StageExchange
from heteromesh.parallel.pipeline.owner import StageOwner
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.json import costs_from_json, costs_to_json
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.plan import Plan
from heteromesh.planner.stages.json import Basis
from heteromesh.runtime.engine.pipeline import Pipeline
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.hooks.whole import WholeStages
from heteromesh.runtime.training.build import build_collectives, build_compression
from heteromesh.runtime.training.job import Job, name_of
from heteromesh.runtime.training.modes.api import Mode, compression_of
from heteromesh.runtime.training.trial import try_model
from heteromesh.runtime.work.packed import PackedPipeline, work_of
from heteromesh.runtime.work.source import WorkSource


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
            "gradient_compression": compression_of(self._runner.groups.peers),
            "stages": self._plan.layout["placement"]["stages"],
            "micro_batches": self._plan.layout["placement"]["micro_batches"],
        }

    def _load_costs(self) -> Costs:
        config = self._job.config
        if config.cost is not None:
            return bind(load_constants(Path(config.cost)), self._cluster)
        return costs_from_json(self._plan.layout["costs"], "layout.costs")
