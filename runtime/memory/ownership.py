"""The ownership of a job's sharded weights: planned once, from what was measured, equal on every rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.layer_major.schedule import LayerOrder
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.ownership.in_job import JobModel, JobRank, kept_layers, sharded_in_job
from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes
from heteromesh.planner.ownership.state_tiers import least_offloaded
from heteromesh.planner.participation.in_job import (
    Choose,
    JobOwnership,
    JobTokens,
    find_ownership,
    keeping,
    plan_ownership,
)
from heteromesh.planner.participation.in_job_traffic import job_traffic
from heteromesh.planner.reduction.nics import over_one_nic
from heteromesh.runtime.memory.offload import OptimizerOffload, TiersBelow
from heteromesh.runtime.memory.shares import OwnedBytes

_RECOMPUTED = 4.0
"""Forwards that a pass costs whose layers are all computed again: twice forward, and a backward of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedJob:
    """What the ranks of a job own, keep and hold."""

    model: JobModel
    ranks: tuple[JobRank, ...]
    tokens: TokenBytes
    order: tuple[int, ...]
    """Indices of the layers, each once, in the order in which passes go through them first."""
    plan: JobOwnership
    offload: OptimizerOffload
    """Of the optimizer's state that each rank owns."""
    owned: tuple[OwnedBytes, ...] = ()
    """By rank, what it owns of trained weights where these have one owner each; empty: the plan's fractions."""

    def dealt(self, owned: Sequence[OwnedBytes]) -> OwnedJob:
        """Returns the same with what the ranks own in fact."""
        model, plan = self.model, self.plan
        frozen = model.whole - model.whole_trained
        fractions = [(o.weights + f * frozen) / model.whole for o, f in zip(owned, plan.fractions, strict=True)]
        found = replace(self, plan=replace(plan, fractions=tuple(fractions)), owned=tuple(owned))
        memory = found.memory(*zip(*plan.expected, strict=True))
        return replace(found, plan=replace(found.plan, memory=memory))

    @property
    def resident(self) -> list[Collection[int]]:
        """By rank, the indices of the layers that stay gathered there."""
        count = len(self.order)
        return [frozenset(self.order[count - kept :]) for kept in self.plan.resident]

    def bounded(self, costs: Costs, cluster: Cluster, *, given: bool) -> Costs:
        """Returns the costs with the limits of these ranks' memory, and with what their transfers take.

        given: the user has said what a pass may hold.
        """
        plan, capacity = self.plan, costs.capacity
        quicker = [_RECOMPUTED / (_RECOMPUTED - kept / len(self.order)) for kept in plan.kept]
        if plan.pass_tokens and not given:
            capacity = tuple(min(known, own) for known, own in zip(capacity, plan.pass_tokens, strict=True))
        return replace(
            costs,
            speeds=tuple(v * by for v, by in zip(costs.speeds, quicker or [1.0] * costs.ranks, strict=True)),
            capacity=capacity,
            step_capacity=plan.step_tokens,
            traffic=job_traffic(self.model, plan, *_uplinks(costs, cluster)),
        )

    def kept_layers(self, rank: int, of_pass: int, of_step: int) -> int:
        """Returns of how many layers, the last ones, a rank keeps activations in a step of so many of its tokens."""
        resident, fraction = self.plan.resident[rank], self.plan.fractions[rank]
        sizes = {"of_pass": of_pass, "of_step": of_step}
        return kept_layers(self._models()[rank], self.ranks[rank], fraction, resident, self.tokens, **sizes)

    def memory(self, of_pass: Sequence[float], of_step: Sequence[float]) -> tuple[MemoryByKind, ...]:
        """Returns by rank what it holds at the most in a step of so many tokens by rank."""
        plan = self.plan
        return tuple(
            sharded_in_job(model, rank, fraction, kept, self.tokens, of_pass=p, of_step=t)
            for model, rank, fraction, kept, p, t in zip(
                self._models(), self.ranks, plan.fractions, plan.resident, of_pass, of_step, strict=True
            )
        )

    def _models(self) -> list[JobModel]:
        """Returns the model as each rank owns it: state of whole matrices may be other than its fraction of all."""
        if not self.owned:
            return [self.model] * len(self.ranks)
        parts = [fraction * self.model.whole_trained for fraction in self.plan.fractions]
        return [replace(self.model, state=o.state / (n or 1.0)) for o, n in zip(self.owned, parts, strict=True)]

    def resolved(self) -> dict[str, Any]:
        """Returns what config.json has of it."""
        return {
            "fractions": list(self.plan.fractions),
            "resident_layers": list(self.plan.resident),
            "layers_not_recomputed": list(self.plan.kept),
            "pass_tokens": list(self.plan.pass_tokens),
            "step_tokens": list(self.plan.step_tokens),
            "bytes_per_token": asdict(self.tokens),
            "memory": [asdict(kinds) for kinds in self.plan.memory],
        }


def own_in_job(
    world: World,
    cluster: Cluster,
    costs: Costs,
    model: JobModel,
    ranks: Sequence[JobRank],
    tokens: JobTokens,
    order: tuple[int, ...],
    below: TiersBelow,
) -> OwnedJob:
    """Returns the job's ownership, equal on every rank. costs: whose speeds say what tokens a rank is given. order: see
    `run_order`, in which the model's layers are too. below: where the optimizer's state may go, or is to.

    Raises DoesNotFit on every rank where the ranks' memory can't hold the model.
    """
    quick = tuple(replace(rank, speed=speed) for rank, speed in zip(ranks, costs.speeds, strict=True))

    def choose(most: Sequence[float] | None) -> Sequence[float]:
        return over_one_nic(cluster, max_fraction=most).fractions

    def plan() -> tuple[JobOwnership, OptimizerOffload]:
        return own_and_offload(model, quick, tokens, choose, below)

    plan_, offload = world.once(plan)
    ranks_ = offload.within(quick)
    return OwnedJob(model=model, ranks=ranks_, tokens=tokens.bytes, order=order, plan=plan_, offload=offload)


def own_and_offload(
    model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens, choose: Choose, below: TiersBelow
) -> tuple[JobOwnership, OptimizerOffload]:
    """Returns who owns what, and where the optimizer's state of that lies: below the devices, only where the ranks
    could not hold the model otherwise, or as the user wants it.

    Raises DoesNotFit, and UserError where a tier has too little space.
    """

    def placed(plan: JobOwnership, kept: Sequence[float]) -> OptimizerOffload:
        return below.placed(kept, [fraction * model.state * model.whole_trained for fraction in plan.fractions])

    def works(kept: tuple[float, ...]) -> bool:
        plan = find_ownership(model, keeping(ranks, kept), tokens, choose)
        if plan is None:
            return False
        try:
            placed(plan, kept)
        except UserError:
            return False
        return True

    def owned(kept: Sequence[float]) -> tuple[JobOwnership, OptimizerOffload]:
        plan = plan_ownership(model, keeping(ranks, kept), tokens, choose)
        return plan, placed(plan, kept)

    asked = tuple(tiers.device for tiers in below.placed([1.0] * len(ranks), [1.0] * len(ranks)).tiers)
    if below.may_be_used and not works(asked):
        kept = least_offloaded(works, [rank.memory for rank in ranks])
        return owned(kept if kept is not None else (0.0,) * len(ranks))  # raises what is still short
    return owned(asked)


def run_order(order: LayerOrder, count: int) -> tuple[int, ...]:
    """Returns the indices of so many layers in the order in which passes go through them first; unused ones before."""
    used = tuple(dict.fromkeys(order.layers))
    return (*(index for index in range(count) if index not in used), *used)


def _uplinks(costs: Costs, cluster: Cluster) -> tuple[tuple[int, ...], list[float]]:
    """Returns per rank its host, and by host bytes per second each way: of the cluster's links where it describes
    several hosts, else as measured, every rank for itself.
    """
    hosts = range(len(cluster.hosts))
    if len(hosts) > 1:
        links = cluster_links(cluster)
        return cluster.rank_hosts, [links.uplink(host, hosts) for host in hosts]
    ranks = tuple(range(costs.ranks))
    return ranks, [costs.rate(ranks)] * costs.ranks
