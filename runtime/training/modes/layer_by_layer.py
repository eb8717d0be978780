"""All passes through one layer, then the next: weights may be dealt out, and whole only where they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.parallel.initial.stand_ins import GradientSketches
from heteromesh.parallel.layer_major.schedule import LayerOrder
from heteromesh.parallel.model.call import is_compiled
from heteromesh.parallel.model.pass_buffers import unexpand
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.parallel.state.sharded_weights import ShardedWeights
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes
from heteromesh.planner.participation.in_job import JobTokens
from heteromesh.runtime.engine.layer_major import LayerMajor
from heteromesh.runtime.engine.token_bytes import layer_token_bytes
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.hooks.whole import Gathered, Settled
from heteromesh.runtime.memory.offload import on_all, tiers_below
from heteromesh.runtime.memory.ownership import OwnedJob, own_in_job, run_order
from heteromesh.runtime.memory.sizes import job_model, job_ranks
from heteromesh.runtime.process.memory import give_back_at_once
from heteromesh.runtime.training.build import cluster_path
from heteromesh.runtime.training.layer_trial import layer_reducer, try_layers, working_weights
from heteromesh.runtime.training.modes.whole_model import WholeModel

T = TypeVar("T")


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
        """Plans who owns what, and where, once it is measured what passes take."""
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
            tiers_below(job.config, job.optimizer, world, self._cluster),
        )
        self.offload = self._owned.offload
        self.is_tight = bool(self._owned.plan.step_tokens)
        if self.is_tight:
            give_back_at_once(world.device)
        return self._owned.plan.fractions

    def _bounded(self, costs: Costs) -> Costs:
        if self._owned is None:
            return super()._bounded(costs)
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
        job, initial, source, optimizer = self._job, self._job.initial, None, self._placed()
        if self._sketches is not None:
            self._sketches.close()
            source = initial
        assert self._owned is not None
        make = partial(
            ShardedWeights,
            optimizer,
            job.model,
            self.exchange.buckets,
            self._world,
            self.engine.own_parameters,
            resident=self._owned.resident,
            working=self._working,
            source=source,
        )
        state = on_all(self._world, make)
        initial.forget()
        if owned := self._owned_bytes():
            self._owned = self._owned.dealt(owned)
        return state
