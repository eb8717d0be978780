"""Before the first step: which cluster, which costs, which plan file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from heteromesh.planner.cluster import Cluster, load_cluster, local_cluster
from heteromesh.planner.cost import Costs
from heteromesh.planner.cost_file import bind, load_constants
from heteromesh.planner.errors import UserError
from heteromesh.planner.plan import Plan, load
from heteromesh.runtime.batch import Reader
from heteromesh.runtime.calibrate import Calibration
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.executor import StepExecutor

CLUSTER_VARIABLE, PLAN_VARIABLE = "HETEROMESH_CLUSTER", "HETEROMESH_PLAN"
DRY_RUN_VARIABLE = "HETEROMESH_DRY_RUN"
"""Number of ranks to plan for; set by `heteromesh run --dry-run`."""


def find_cluster(config: TrainerConfig, ranks: int) -> Cluster:
    """The cluster file of the configuration or of `heteromesh run`; else equal processes on one host.

    Raises UserError when it has another number of ranks than the job.
    """
    path = config.cluster or os.environ.get(CLUSTER_VARIABLE)
    if not path:
        return local_cluster(ranks)
    cluster = load_cluster(Path(path))
    if cluster.ranks != ranks:
        raise UserError(
            f"cluster file {path} describes {cluster.ranks} ranks and the job has {ranks}: "
            "start one process per device of the file, or describe the devices that run"
        )
    return cluster


def find_plan(config: TrainerConfig, cluster: Cluster) -> Plan | None:
    """The plan file of the configuration or of `heteromesh run`, if any; raises UserError if it is for another job."""
    path = config.plan or os.environ.get(PLAN_VARIABLE)
    if not path:
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
    return plan


def find_costs(config: TrainerConfig, cluster: Cluster, executor: StepExecutor, reader: Reader) -> Costs:
    """The cost file's constants, else what the model is measured to need on these devices. Equal on every rank."""
    if config.cost is not None:
        costs = bind(load_constants(Path(config.cost)), cluster)
    else:
        sample = torch.from_numpy(reader.sample_tokens(4096))
        measured = Calibration(executor, sample, max(reader.lengths)).measure(config.tokens_per_device)
        described = config.cluster or os.environ.get(CLUSTER_VARIABLE)
        costs = replace(measured, hosts=cluster.rank_hosts) if described else measured
    if config.tokens_per_device is not None:
        costs = replace(costs, capacity=(config.tokens_per_device,) * cluster.ranks)
    return costs
