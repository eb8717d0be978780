"""`heteromesh run --dry-run`: the first steps of a training script, planned for a cluster that is not running."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from heteromesh.comm.gradients.buckets import build_buckets
from heteromesh.comm.world import World, pick_device
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster, load_cluster, local_cluster
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.participation.told import WORKING, world_step
from heteromesh.planner.participation.working import WorkingRanks, working_costs
from heteromesh.planner.plan import Plan, PlannedCluster, dump
from heteromesh.planner.report.assemble import peak_tokens
from heteromesh.planner.report.text import first_passes, step_table
from heteromesh.planner.sequences.step import plan_step
from heteromesh.runtime.engine.calibrate import Calibration
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.process.variables import CLUSTER_VARIABLE, DRY_RUN_VARIABLE
from heteromesh.runtime.training.job import Job
from heteromesh.runtime.training.job_check import check_job
from heteromesh.runtime.training.trial import try_model
from heteromesh.runtime.work.participation import told, working_ranks

STEPS = 3


def dry_run(job: Job) -> None:
    """Prints the plan of the first steps and writes it to RUN_DIR/plan.json; nothing is trained."""
    check_job(job)
    # this one machine need not hold what the cluster does
    if job.initial.on_meta:
        job.initial.stand_in(World().device)
    try_model(job.model, job.reader, job.loss)
    ranks = int(os.environ[DRY_RUN_VARIABLE])
    file = job.config.cluster or os.environ.get(CLUSTER_VARIABLE)
    cluster = load_cluster(Path(file)) if file else local_cluster(ranks)
    costs, source = _costs(job, cluster)
    chosen = _chosen(job, cluster, costs)
    ranks_told = () if chosen is None else (told(chosen, cluster),)
    working = tuple(range(cluster.ranks)) if chosen is None else chosen.ranks
    own = working_costs(costs, working)
    batches = [job.sampler.next_batch() for _ in range(min(STEPS, job.config.max_steps))]
    planned = (plan_step(b.lengths, own, time_limit=job.config.plan_seconds) for b in batches)
    steps = tuple(world_step(step, working) for step in planned)
    plan = Plan(
        cluster=PlannedCluster(fingerprint=cluster.fingerprint, ranks=cluster.ranks),
        model=type(job.model).__name__,
        layout={
            "costs": costs_to_json(costs) | {"source": source},
            "peak_tokens": peak_tokens(steps, cluster.ranks),
            WORKING: list(working),
        },
        steps=steps,
    )
    path = Path(job.config.run_dir) / "plan.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        dump(plan, path)
    except OSError as error:
        raise UserError(f"the plan can't be written to {path} ({error.strerror}): choose another run_dir") from error
    lines = [
        f"dry run: {cluster.ranks} ranks of cluster {cluster.name}, costs {source}",
        *ranks_told,
        step_table(steps, cluster.ranks),
        first_passes(steps[0], cluster.ranks),
        f"nothing was trained; to run exactly these steps: heteromesh run --plan {path} ...",
    ]
    sys.stdout.write("\n\n".join(lines) + "\n")


def _chosen(job: Job, cluster: Cluster, costs: Costs) -> WorkingRanks | None:
    """Returns who works as a job would choose; None: all."""
    if not job.config.idle_hosts or len(cluster.hosts) == 1:
        return None
    buckets = build_buckets(job.model.parameters())
    chosen = working_ranks(job.sampler, cluster, costs, buckets, job.config.plan_seconds)
    return chosen if len(chosen.ranks) < cluster.ranks else None


def _costs(job: Job, cluster: Cluster) -> tuple[Costs, str]:
    """The cost file's constants; else measured in this one process and spread over the cluster's ranks and links."""
    if job.config.cost is not None:
        costs = bind(load_constants(Path(job.config.cost)), cluster)
        given = job.config.tokens_per_device
        return replace(costs, capacity=(given,) * cluster.ranks) if given else costs, "from the cost file"
    device = pick_device()
    executor = StepExecutor(
        job.model.to(device),
        World(device=device),
        autocast=job.config.autocast,
        checkpoint_activations=job.config.checkpoint_activations,
        loss=job.loss,
    )
    calibration = Calibration(executor, job.reader.sample_input, max(job.reader.lengths))
    alone = calibration.measure(job.config.tokens_per_device)
    shape = calibration.attention_shape()
    costs = replace(
        alone,
        speeds=cluster.speeds(),
        capacity=alone.capacity * cluster.ranks,
        methods=shape.methods(executor.forwards, cluster.rank_hosts) if shape else (),
        rate=cluster_links(cluster),
        hosts=cluster.rank_hosts,
        offload_seconds=alone.offload_seconds * cluster.ranks,
    )
    return costs, "measured in one process here, scaled by the cluster's speeds and links"
