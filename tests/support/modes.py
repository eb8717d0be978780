"""One job that uses every feature, trained in each mode: several runs one after the other in the same processes."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from stage_plans import write_stage_plan
from stages import simple
from torch import nn

import heteromesh as hm
from heteromesh.comm.tcp.state_transfer import digest_of
from heteromesh.comm.world import World
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.wire.bounds import Bounds
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.parallel.initial.weights import InitialWeights
from heteromesh.planner.cluster.cluster import Cluster, load_cluster
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.plan import Plan, PlannedCluster, dump
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.process.environment import environment_of
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama
from ranks import run_processes, run_ranks
from steps import TINY
from trainers import DATA, gather_costs

SECRET = "0123456789abcdef" * 2
BATCH_TOKENS = 220
FROM_FILE = 2
"""Steps of the plan file."""
MARK = 0.125
"""The gap that the plan file's steps claim, by which they are known again."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How the job is run: on how many ranks, with which settings, launched how."""

    ranks: int
    others: int
    """Ranks of the run that continues it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    elastic: bool = False
    stages: tuple[int, ...] = ()
    """Layers of each pipeline stage, whose ranks are replicas of each other; empty: no stages."""
    meta: bool = False
    """Whether the model has no memory when the job begins; its first weights are the same."""

    def plan(self, folder: Path, ranks: int, cluster: Cluster | None = None) -> dict[str, Path]:
        """Writes the plan file that a run of so many ranks needs to be of this mode; returns it as a setting."""
        if not self.stages:
            return {}
        placement = simple(*self.stages, replicas=ranks // len(self.stages))
        path = folder / f"stages-{ranks}{'-described' if cluster else ''}.json"
        return {"plan": write_stage_plan(path, placement, cluster=cluster)}


MODES = {
    "ordinary": Mode(ranks=2, others=3),
    "sharded optimizer": Mode(ranks=3, others=2, settings={"shard_optimizer": True}),
    "sharded weights": Mode(ranks=3, others=2, settings={"shard_weights": True}),
    "optimizer on disk": Mode(ranks=2, others=3, settings={"offload_optimizer": "disk"}),
    "sharded weights, optimizer on disk": Mode(
        ranks=2, others=3, settings={"shard_weights": True, "offload_optimizer": "disk"}
    ),
    "pipeline": Mode(ranks=4, others=2, stages=(1, 1), meta=True),
    "elastic": Mode(ranks=2, others=3, settings={"fault_tolerance": True}, elastic=True, meta=True),
    "elastic, sharded optimizer": Mode(
        ranks=3, others=2, settings={"fault_tolerance": True, "shard_optimizer": True}, elastic=True
    ),
    "elastic, sharded weights": Mode(
        ranks=3, others=2, settings={"fault_tolerance": True, "shard_weights": True}, elastic=True, meta=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of `fit`, the same on all ranks."""

    folder: Path
    settings: Mapping[str, Any]
    environments: tuple[Mapping[str, str], ...] = ()
    """By rank."""
    meta: bool = False
    matrices: bool = False
    """Whether the optimizer is one that needs whole matrices."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a rank has of a run."""

    losses: tuple[float, ...] = ()
    digest: str = ""
    """Of the parameters."""
    failed: str = ""


class HeldOut(Hook):
    """The loss of one sequence, after every second step."""

    evaluate_every = 2

    def __init__(self) -> None:
        self.tokens = torch.arange(40)[None] % TINY.vocab

    def evaluate(self, step: int, model: nn.Module, world: World) -> Mapping[str, float]:
        """Returns it, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            logits = model(self.tokens)[0, :-1]
        return {"held_out": float(nn.functional.cross_entropy(logits, self.tokens[0, 1:]))}


def make_job(folder: Path, settings: Mapping[str, Any], *, meta: bool = False, matrices: bool = False) -> hm.Trainer:
    """A model with dropouts, gradients that are clipped, evaluations and checkpoints."""
    with torch.device("meta"):
        model = Llama(TINY)
    for layer in model.layers:
        layer.down = nn.Sequential(layer.down, nn.Dropout(0.2))
    if not meta:
        InitialWeights(model, None, 0).fill(torch.device("cpu"))
    # a large epsilon: AdamW's first steps are the gradients' signs, which rounding decides where gradients are small
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
    if matrices:
        optimizer = torch.optim.Adafactor(model.parameters(), lr=3e-3)
    options: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "run_dir": folder, "plan_seconds": 0.02, "clip_norm": 0.5}
    options |= {"checkpoint_every": 2, "print_plans": 0}
    config = hm.TrainerConfig(**(options | dict(settings)))
    return hm.Trainer(model, optimizer, [torch.tensor(s) for s in DATA], config, hooks=[HeldOut()])


def train(runs: Sequence[Run], rank: int) -> list[Result]:
    """Makes the runs in this process; one that fails keeps none from the others."""
    results = []
    for run in runs:
        os.environ.update(run.environments[rank] if run.environments else {})
        trainer = make_job(run.folder, run.settings, meta=run.meta, matrices=run.matrices)
        try:
            losses = trainer.fit().losses
        except BaseException:
            results.append(Result(failed=traceback.format_exc()))
        else:
            results.append(Result(losses=losses, digest=digest_of(list(trainer.model.parameters()))))
    return results


def in_mode(mode: Mode, ranks: int, runs: Sequence[Run]) -> list[list[Result]]:
    """The results by run and rank."""
    runs = [replace(run, settings={**mode.settings, **run.settings}, meta=mode.meta) for run in runs]
    if not mode.elastic:
        rows = run_ranks(ranks, _fixed, runs)
        return [list(row) for row in zip(*rows, strict=True)]
    with ExitStack() as stack:
        timing, bounds = Timing(stuck=150.0, silence=60.0, hang=60.0), Bounds(min=ranks, max=ranks)
        for number, run in enumerate(runs):
            coordinator = Coordinator(SECRET.encode(), bounds=bounds, timing=timing).start()
            stack.callback(coordinator.stop)
            runs[number] = replace(run, environments=tuple(_environment(coordinator, i, ranks) for i in range(ranks)))
        rows = run_processes(ranks, _elastic, runs)
    return [list(row) for row in zip(*rows, strict=True)]


def _fixed(world: World, runs: Sequence[Run]) -> list[Result]:
    return train(runs, world.rank)


def _elastic(rank: int, runs: Sequence[Run]) -> list[Result]:
    return train(runs, rank)


def _environment(coordinator: Coordinator, place: int, ranks: int) -> dict[str, str]:
    return environment_of(
        coordinators=[coordinator.address],
        secret=SECRET,
        name=f"host:{place}",
        hosts=["127.0.0.1"],
        bounds=Bounds(min=ranks, max=ranks),
        place=place,
    )


def write_files(folder: Path, mode: Mode) -> dict[str, Path]:
    """Two unlike hosts, costs by which long sequences must be split, and a plan of the first steps or of stages."""
    ranks = mode.ranks
    cluster, cost, plan = folder / "cluster.toml", folder / "cost.toml", folder / "plan.json"
    hosts = [
        f'[[hosts]]\nnames = ["{name}"]\ndevice = "small"\ncount = {count}\n'
        f'nics = [{{ kind = "ethernet", gbit = {gbit} }}]\n'
        for name, count, gbit in (("a", ranks - 1, 1), ("b", 1, 3))
    ]
    device = "[devices.small]\ntflops = 1\nmemory_gb = 4\nmemory_gbps = 10\nlink_gbps = 1\n"
    cluster.write_text(device + "".join(hosts))
    cost.write_text(gather_costs(64))
    described = load_cluster(cluster)
    if mode.stages:
        return {"cluster": cluster, "cost": cost} | mode.plan(folder, ranks, described)
    costs, sampler = bind(load_constants(cost), described), Sampler([len(s) for s in DATA], batch_tokens=220, seed=0)
    batches = [sampler.next_batch() for _ in range(FROM_FILE)]
    steps = tuple(replace(hm.plan_step(batch.lengths, costs), gap=MARK) for batch in batches)
    planned = PlannedCluster(fingerprint=described.fingerprint, ranks=described.ranks)
    dump(Plan(cluster=planned, model="Llama", steps=steps), plan)
    return {"cluster": cluster, "cost": cost, "plan": plan}
