"""Before the first step: which cluster, which costs, which plan file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.collectives.int8 import Int8Collectives, seconds_per_value
from heteromesh.comm.collectives.torch import TorchCollectives
from heteromesh.comm.collectives.uneven import UnevenCollectives, open_collectives
from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.offload.optimizer import is_offloadable
from heteromesh.parallel.state.separable import check_separable
from heteromesh.planner.cluster.cluster import Cluster, load_cluster, local_cluster
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.plan import Plan, load
from heteromesh.planner.reduction.compression import seconds_saved
from heteromesh.planner.reduction.memory import largest_fractions
from heteromesh.planner.reduction.nics import over_one_nic
from heteromesh.planner.reduction.reduction import Reduction, reduction_for
from heteromesh.planner.stages.json import stages_of
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.engine.calibrate import Calibration
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.engine.known import known_costs
from heteromesh.runtime.network.nics import open_nic_collectives
from heteromesh.runtime.process.environment import PLACE
from heteromesh.runtime.process.failure import PeerLost
from heteromesh.runtime.process.peers import SILENCE_SECONDS
from heteromesh.runtime.process.variables import CLUSTER_VARIABLE, PLAN_VARIABLE
from heteromesh.runtime.work.reader import Reader


def build_cluster(config: TrainerConfig, ranks: int) -> Cluster:
    """The cluster file of the configuration or of `heteromesh run`; else equal processes on one host.

    Raises UserError when it has another number of ranks than the job.
    """
    path = cluster_path(config)
    if not path:
        return local_cluster(ranks)
    cluster = load_cluster(Path(path))
    if cluster.ranks != ranks:
        raise UserError(
            f"cluster file {path} describes {cluster.ranks} ranks and the job has {ranks}: "
            "start one process per device of the file, or describe the devices that run"
        )
    return cluster


def described_cluster(config: TrainerConfig) -> Cluster | None:
    """The hosts of this job, where a cluster file describes them; what is wrong with it `build_cluster` tells later."""
    if not cluster_path(config):
        return None
    try:
        return build_cluster(config, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError:
        return None


def elastic_cluster(config: TrainerConfig, place: int | None) -> Cluster | None:
    """Returns the hosts of a job of changing members when all are there, where a cluster file describes them.

    place: which rank of it this one is. Raises UserError where the file has no such rank, and where a cluster or a plan
    file needs to know it.
    """
    path = cluster_path(config)
    if place is None and (path or plan_path(config)):
        raise UserError(
            f"{PLACE} is not set, so this process does not know which rank of the {'cluster' if path else 'plan'} file "
            "it is: start the job with `heteromesh run --fault-tolerance`, on several hosts with --node-rank"
        )
    if not path:
        return None
    cluster = load_cluster(Path(path))
    assert place is not None
    if place >= cluster.ranks:
        raise UserError(
            f"cluster file {path} describes {cluster.ranks} ranks and this is rank {place} (counted from 0): "
            "start at most one process per device of the file, or describe the devices that run"
        )
    return cluster


def cluster_path(config: TrainerConfig) -> str | Path | None:
    """Returns the cluster file of the configuration or of `heteromesh run`, if any."""
    return config.cluster or os.environ.get(CLUSTER_VARIABLE) or None


def plan_path(config: TrainerConfig) -> str | Path | None:
    """The plan file of the configuration or of `heteromesh run`, if any."""
    return config.plan or os.environ.get(PLAN_VARIABLE) or None


def build_plan(config: TrainerConfig, cluster: Cluster) -> Plan | None:
    """What `plan_path` names; raises UserError if it is for another job."""
    path = plan_path(config)
    if path is None:
        return None
    plan = load(Path(path))
    if plan.cluster.ranks != cluster.ranks:
        raise UserError(
            f"plan file {path} is for {plan.cluster.ranks} ranks and the job has {cluster.ranks}: "
            f"start {plan.cluster.ranks} processes or make the plan for this cluster"
        )
    if plan.cluster.fingerprint != cluster.fingerprint:
        raise UserError(
            f"plan file {path} is for the cluster {plan.cluster.fingerprint} and this one is {cluster.fingerprint}: "
            "make the plan again with this cluster file"
        )
    if stages_of(plan.layout, f"plan file {path}: layout") is not None:
        _check_stages(config, path)
    return plan


def _check_stages(config: TrainerConfig, path: str | Path) -> None:
    """Raises UserError where a job whose plan has stages wants what stages don't have."""
    reasons = {
        "shard_optimizer": "each rank has the state of its stage only",
        "shard_weights": "each rank has the weights of its stage only",
        "offload_optimizer": "the state of stages is not moved",
        "fault_tolerance": "no other rank has a stage's weights",
        "compare_batches": "static layouts need the whole model on each rank",
    }
    for name, reason in reasons.items():
        if getattr(config, name) not in (False, 0, "auto", "none"):
            raise UserError(
                f"{name} is {getattr(config, name)!r} and plan file {path} trains the model in pipeline stages "
                f"({reason}): turn it off, or give another plan file"
            )


def build_costs(config: TrainerConfig, cluster: Cluster, executor: StepExecutor, reader: Reader) -> Costs:
    """The cost file's constants, else the cluster file's for this model, else what the model is measured to need.

    Equal on every rank.
    """
    if config.cost is not None:
        costs = bind(load_constants(Path(config.cost)), cluster)
    else:
        calibration = Calibration(executor, reader.sample_input, max(reader.lengths))
        known = known_costs(cluster, executor, calibration.attention_shape(), config.autocast)
        links = cluster_links(cluster) if cluster.measured.nic_gbit or cluster.measured.link_gbps else None
        measured = known or calibration.measure(config.tokens_per_device, links)
        described = cluster_path(config)
        costs = replace(measured, hosts=cluster.rank_hosts) if described else measured
    if config.tokens_per_device is not None:
        costs = replace(costs, capacity=(config.tokens_per_device,) * cluster.ranks)
    return costs


@contextmanager
def build_collectives(
    config: TrainerConfig,
    cluster: Cluster,
    optimizer: torch.optim.Optimizer,
    world: World,
    limits: Sequence[float] | None = None,
) -> Iterator[Collectives | None]:
    """What gradients are summed with: owners as the cluster's links (and memory, for a sharded optimizer) want them.

    Where hosts are described with several Ethernet NICs and all can be used, over all of them
    (runtime/network/nics.py). None in a world of one rank. Raises UserError when the optimizer is to be sharded and
    can't be, or its state fits nowhere, and where the user named NICs that can't be used.

    limits: per rank, the largest fraction that it may own, where weights are dealt out too.
    """
    if world.size == 1:
        yield None
        return
    limits = limits or world.once(lambda: _limits(config, cluster, optimizer))
    if world.device.type != "cpu":
        assert world.gradients
        fractions = world.once(lambda: reduction_for(cluster, max_fraction=limits)).fractions
        yield TorchCollectives(world.gradients, fractions)
        return
    # the watch of the peers is to be the first to see that a host is silent: its sentence says more
    over_nics = open_nic_collectives(world, cluster, limits, 1.5 * min(SILENCE_SECONDS, config.timeout_seconds))
    if over_nics is not None:
        with _closing(over_nics, world) as collectives:
            yield collectives
        return
    assert world.gradients
    reduction = world.once(lambda: over_one_nic(cluster, max_fraction=limits))
    collectives = open_collectives(world.gradients, reduction)
    try:
        yield collectives
    finally:
        collectives.close()


@contextmanager
def _closing(collectives: UnevenCollectives, world: World) -> Iterator[UnevenCollectives]:
    """Closes the transport too; not before the peers are done with it, unless something went wrong."""
    try:
        yield collectives
    except BaseException as error:
        collectives.transport.close()  # first: it ends what the collectives still wait for
        collectives.close()
        if isinstance(error, GroupAborted):
            # the watch of the peers, if it saw who is gone, says so instead
            sentence = (
                f"the connections over all NICs of the hosts failed ({error}): look at the other ranks' output and at "
                "each NIC and its cable, then start the run again (resume=True continues at the last checkpoint)"
            )
            raise PeerLost(sentence).with_traceback(error.__traceback__) from error
        raise
    collectives.close()
    world.barrier()
    collectives.transport.close()


def _limits(config: TrainerConfig, cluster: Cluster, optimizer: torch.optim.Optimizer) -> tuple[float, ...] | None:
    """Per rank, the largest fraction of optimizer state that it has memory for; None: no limits."""
    # without a cluster file the devices' memory is a guess, which must not refuse what would fit
    if not config.shards_state or not cluster_path(config):
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    separation = check_separable(optimizer)
    state = separation.state_bytes
    limits = largest_fractions(
        cluster,
        parameter_bytes=sum(p.nbytes for p in parameters),
        state_bytes=sum(state.values()),
        granule=max((state[p] for p in separation.whole), default=0.0),
    )
    asked = config.offload_optimizer
    # what does not fit is offloaded (runtime/memory/replicated.py)
    moved = asked == "disk" or (asked == "auto" and sum(limits) < 1 and is_offloadable(optimizer))
    return None if moved else limits


@contextmanager
def build_compression(
    config: TrainerConfig, world: World, buckets: Sequence[Bucket], costs: Costs
) -> Iterator[Collectives | None]:
    """Opens what gradients are summed with in the end: the world's collectives, or these with int8 on the wire.

    Every rank must call it. Raises UserError where int8 is asked for and does not work.
    """
    collectives = world.collectives
    if world.size == 1 or config.gradient_compression == "none":
        yield collectives
        return
    if not isinstance(collectives, UnevenCollectives):
        if config.gradient_compression == "int8":
            raise UserError(
                f"gradient_compression is 'int8' and the ranks are on {world.device.type} devices: "
                "it works on CPU ranks only, so set it to 'none'"
            )
        yield collectives
        return
    if config.gradient_compression == "auto" and _int8_saves(config, world, buckets, collectives.reduction, costs) <= 0:
        yield collectives
        return
    compression = Int8Collectives(collectives, collectives.transport)
    try:
        yield compression
    finally:
        compression.close()


def _int8_saves(
    config: TrainerConfig, world: World, buckets: Sequence[Bucket], reduction: Reduction, costs: Costs
) -> float:
    """Returns the seconds of a step that int8 saves, equal on every rank."""
    # of the last pass at most; two thirds of a pass are its backward
    tokens = min(config.batch_tokens / len(costs.speeds), *costs.capacity)
    return seconds_saved(
        reduction,
        values=sum(bucket.numel for bucket in buckets),
        seconds_per_value=max(world.gather(seconds_per_value())),
        hidden_seconds=2 / 3 * costs.seconds_per_token * tokens,
    )
