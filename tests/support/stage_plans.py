"""Plan files that train a model in stages of a given placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from heteromesh.planner.cluster.cluster import Cluster, local_cluster
from heteromesh.planner.cost.analytic import analytic_costs
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.plan import Plan, PlannedCluster, dump
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.stages.hosts import cluster_resources
from heteromesh.planner.stages.json import STAGES, decision_to_json
from heteromesh.planner.stages.placement import Decision
from heteromesh.planner.stages.predict import predict
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.planner.stages.workload import workloads


def write_stage_plan(
    path: Path, placement: Placement, lengths: Sequence[int] = (30, 20, 7), cluster: Cluster | None = None
) -> Path:
    """Plans for a cluster of as many equal processes unless given; returns the path."""
    ranks = sum(len(stage.ranks) for stage in placement.stages)
    cluster, layers = cluster or local_cluster(ranks), placement.layers
    spec = ModelSpec(name="tiny", layers=layers, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=61)
    costs = analytic_costs(cluster, spec)
    resources = cluster_resources(cluster)
    work = replace(workloads(spec, costs, lengths)[0], micro_batches=ranks)
    # stages of parts of a host can be trained, but not predicted
    alike = Placement(stages=(Stage(ranks=tuple(range(ranks)), layers=layers),), micro_batches=(1,) * ranks)
    prediction = predict(alike, resources, work)
    decision = Decision(
        placement=placement, prediction=prediction, work=work, family="pipeline", bound_seconds=prediction.seconds,
        candidates=(),
    )  # fmt: skip
    plan = Plan(
        cluster=PlannedCluster(fingerprint=cluster.fingerprint, ranks=ranks),
        model="tiny",
        layout={
            "costs": costs_to_json(costs),
            "placement": decision_to_json(decision, resources),
            "trains": STAGES,
        },
        steps=(plan_step(lengths, costs),),
    )
    dump(plan, path)
    return path
