"""Assembles a plan: steps, what they were compared with, memory, and the cost model they rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.analytic import analytic_costs, state_bytes
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.cost.measured import bind, measured_costs
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.constants import Constants
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.plan import Plan, PlannedCluster, Rejected, Step
from heteromesh.planner.report.check import check_step
from heteromesh.planner.report.fixes import Fixes
from heteromesh.planner.sequences.static import static_best_degree, static_data_parallel, static_sequence_parallel
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.stages.hosts import cluster_resources
from heteromesh.planner.stages.json import STAGES, STEPS, decision_to_json, why
from heteromesh.planner.stages.placement import place
from heteromesh.planner.stages.workload import workloads

PLACEMENT_SECONDS = 5.0
"""To place stages, once a plan, where the network is uneven."""
COST_FILE, MEASURED, ANALYTIC = "cost file", "measured", "analytic"
Layout = Callable[[Sequence[int], Costs], Step]


def static_layouts(ranks: int) -> tuple[tuple[str, Layout], ...]:
    """Returns the even layouts that a plan on so many ranks is compared with, by name."""
    ends: tuple[tuple[str, Layout], ...] = (
        ("static sequence parallel on all ranks", static_sequence_parallel),
        ("static data parallel", static_data_parallel),
    )
    # with two ranks or fewer there is no degree between the two
    return ends if ranks <= 2 else (*ends, ("static, best even degree for each step", static_best_degree))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A cluster and a model with their costs."""

    cluster: Cluster
    model: ModelSpec
    costs: Costs
    source: str
    """Where the costs come from: COST_FILE, MEASURED or ANALYTIC."""
    fixes: Fixes

    @property
    def activation_bytes(self) -> int:
        """Per token."""
        return self.model.activation_bytes_per_token(checkpointing=bool(self.fixes.checkpointing))

    @property
    def state_bytes(self) -> int:
        """Per rank; 0 where the costs are not ours, because then how the states are sharded is not known."""
        return state_bytes(self.model, self.cluster.ranks) if self.source == ANALYTIC else 0


def build_problem(cluster: Cluster, model: ModelSpec, constants: Constants | None, fixes: Fixes) -> Problem:
    """Takes the costs from the given constants, else from the cluster's measured ones, else from the analytic model."""
    costs, source = measured_costs(cluster, model), MEASURED
    if constants:
        costs, source = bind(constants, cluster), COST_FILE
    if costs is None:
        costs, source = analytic_costs(cluster, model, checkpointing=bool(fixes.checkpointing)), ANALYTIC
    elif fixes.checkpointing is not None:
        raise UserError(
            f"--fix checkpointing can't be used with {source} costs, which have tokens_per_device from a run: "
            "leave it out or leave the constants out"
        )
    return Problem(cluster=cluster, model=model, costs=fixes.apply(costs), source=source, fixes=fixes)


def make_plan(
    problem: Problem,
    batches: Iterable[Sequence[int]],
    *,
    time_limit: float,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Plan:
    """Plans every batch (lengths in tokens) and compares the whole with the static even layouts.

    Every step is checked independently of the solver. Raises UserError where a sequence fits no set of ranks.
    """
    steps = []
    for batch in batches:
        step = plan_step(batch, problem.costs, time_limit=time_limit)
        check_step(step, problem.costs)
        steps.append(step)
        on_step(step)
    peaks = peak_activations(steps, problem.costs)
    compared = compare(steps, problem.costs)
    placement, lost = _placement(problem, steps[0]) if unlike_hosts(problem.cluster) else ({}, ())
    return Plan(
        cluster=PlannedCluster(fingerprint=problem.cluster.fingerprint, ranks=problem.cluster.ranks),
        model=problem.model.name,
        layout=_layout(problem, compared) | placement,
        steps=tuple(steps),
        memory_bytes=tuple(problem.state_bytes + round(tokens * problem.activation_bytes) for tokens in peaks),
        rejected=(*(Rejected(what=c.what, why=c.why) for c in compared), *lost),
    )


def unlike_hosts(cluster: Cluster) -> bool:
    """Returns whether it matters which hosts form which stage: several fabrics, unequal devices or NICs."""
    return len({(host.fabric, host.nics, host.device) for host in cluster.hosts}) > 1


def _placement(problem: Problem, step: Step) -> tuple[dict[str, object], tuple[Rejected, ...]]:
    """Places stages for a step's batch; returns the layout's entries and what they were compared with.

    Nothing that runs splits tensors: degree 1 only.
    """
    resources, checkpointing = cluster_resources(problem.cluster), bool(problem.fixes.checkpointing)
    works = workloads(problem.model, problem.costs, step.batch, checkpointing=checkpointing)
    try:
        decision = place(resources, works, time_limit=PLACEMENT_SECONDS, tensor_parallel=(1,))
    except UserError as error:
        return {}, (Rejected(what="pipeline stages", why=f"infeasible: {error}"),)
    lost = tuple(
        Rejected(what=f"placement, {c.family}", why=why(c, decision))
        for c in decision.candidates
        if c.placement != decision.placement
    )
    staged = len(decision.placement.stages) > 1 and decision.prediction.seconds < step.seconds
    return {"placement": decision_to_json(decision, resources), "trains": STAGES if staged else STEPS}, lost


def peak_tokens(steps: Sequence[Step], ranks: int) -> list[int]:
    """Returns by rank the most tokens that it works on in one pass of any step."""
    peaks = [0] * ranks
    for step in steps:
        for p in step.passes:
            for member, rank in enumerate(p.ranks):
                peaks[rank] = max(peaks[rank], p.tokens(member))
    return peaks


def peak_activations(steps: Sequence[Step], costs: Costs) -> list[float]:
    """Returns by rank the most that its device holds in one pass of any step, in tokens of activations.

    Others' keys that a method holds until backward count; activations that the pass moves to host memory don't.
    """
    peaks = [0.0] * costs.ranks
    for step in steps:
        for p in step.passes:
            held = costs.memory(costs.method(p.method), [p.tokens(member) for member in range(len(p.ranks))])
            for rank, tokens in zip(p.ranks, held, strict=True):
                peaks[rank] = max(peaks[rank], tokens * (1 - p.offload * costs.offload_share))
    return peaks


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutComparison:
    """A static layout on the same batches as the plan."""

    what: str
    seconds: float | None
    """Mean of a step; None where it is infeasible."""
    why: str
    """Words: its seconds beside the plan's, or what does not fit."""


def compare(steps: Sequence[Step], costs: Costs) -> tuple[LayoutComparison, ...]:
    """Compares every static layout on the batches of these steps."""
    return tuple(_compare(what, layout, steps, costs) for what, layout in static_layouts(costs.ranks))


def _compare(what: str, layout: Layout, steps: Sequence[Step], costs: Costs) -> LayoutComparison:
    planned, other = sum(step.seconds for step in steps) / len(steps), 0.0
    for index, step in enumerate(steps):
        try:
            other += layout(step.batch, costs).seconds / len(steps)
        except UserError as error:
            return LayoutComparison(what=what, seconds=None, why=f"infeasible in step {index}: {error}")
    why = f"{other:.4g} s a step, {other / planned:.2f}x the plan's {planned:.4g} s"
    return LayoutComparison(what=what, seconds=other, why=why)


def _layout(problem: Problem, compared: Sequence[LayoutComparison]) -> dict[str, object]:
    states = problem.state_bytes
    return {
        "parameters": {
            "kept": "replicated on every rank, gradients summed once a step",
            "optimizer": f"sharded over {problem.cluster.ranks} ranks" if states else "as in the run that was measured",
            "state_bytes_per_rank": states or None,
            "activation_bytes_per_token": problem.activation_bytes,
            "checkpointing": bool(problem.fixes.checkpointing) if problem.source == ANALYTIC else None,
        },
        "static_seconds_per_step": {c.what: c.seconds for c in compared},
        "fixed": {key: value for key, value in asdict(problem.fixes).items() if value is not None},
        "cost_source": problem.source,
        "costs": costs_to_json(problem.costs),
    }
