"""Assembles a plan: steps, what they were compared with, memory, and the cost model they rest on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.cost.measured import bind, measured_costs
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.constants import Constants
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.participation.effects import Effect, host_effects
from heteromesh.planner.participation.layout import REPLICATED, Setting, WeightLayout
from heteromesh.planner.participation.search import decide, plan_layout
from heteromesh.planner.participation.shortage import does_not_fit, replicated_short
from heteromesh.planner.participation.told import ownership_json, rank_memory, world_costs, world_step
from heteromesh.planner.plan import Plan, PlannedCluster, Rejected, Step
from heteromesh.planner.report.check import check_step
from heteromesh.planner.report.fixes import Fixes
from heteromesh.planner.sequences.batch import validate_batch
from heteromesh.planner.sequences.static import static_best_degree, static_data_parallel, static_sequence_parallel
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.stages.hosts import cluster_resources
from heteromesh.planner.stages.json import STAGES, STEPS, decision_to_json, why
from heteromesh.planner.stages.placement import place
from heteromesh.planner.stages.workload import workloads

PLACEMENT_SECONDS = 5.0
"""To place stages, once a plan, where the network is uneven."""
DECISION_SECONDS = 2.0
"""Of processor time, to decide who takes part, once a plan."""
CANDIDATE_SECONDS = 0.2
"""To plan a candidate; the one that is chosen is planned again where there is more time."""
EFFECT_SECONDS = 3.0
"""To say what each class of hosts adds or costs."""
EFFECT_PLAN_SECONDS = 0.05
COST_FILE, MEASURED, ANALYTIC = "cost file", "measured", "analytic"
ON_ALL_HOSTS = "replicated weights on all hosts"
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
    costs: Costs | None
    """None: analytic ones, which depend on who takes part and are found with the first batch."""
    source: str
    """Where the costs come from: COST_FILE, MEASURED or ANALYTIC."""
    fixes: Fixes

    def setting(self, batch: Sequence[int]) -> Setting:
        """Returns what the analytic planner decides about, for a batch."""
        return Setting(
            cluster=self.cluster,
            model=self.model,
            batch=tuple(batch),
            checkpointing=self.fixes.checkpointing,
            adjust=self.fixes.apply,
        )


def build_problem(cluster: Cluster, model: ModelSpec, constants: Constants | None, fixes: Fixes) -> Problem:
    """Takes the costs from the given constants, else from the cluster's measured ones, else from the analytic model."""
    costs, source = measured_costs(cluster, model), MEASURED
    if constants:
        costs, source = bind(constants, cluster), COST_FILE
    if costs is None:
        return Problem(cluster=cluster, model=model, costs=None, source=ANALYTIC, fixes=fixes)
    if fixes.checkpointing is not None:
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

    With analytic costs the first batch decides which ranks take part and how they hold weights and state. Every step is
    checked independently of the solver. Raises UserError where a sequence fits no set of ranks, DoesNotFit where
    nothing holds the model.
    """
    planned = _with_costs if problem.costs is not None else _with_participation
    return planned(problem, iter(batches), time_limit, on_step)


def _with_costs(
    problem: Problem, batches: Iterator[Sequence[int]], time_limit: float, on_step: Callable[[Step], None]
) -> Plan:
    costs, steps = problem.costs, []
    assert costs is not None
    for batch in batches:
        step = plan_step(batch, costs, time_limit=time_limit)
        check_step(step, costs)
        steps.append(step)
        on_step(step)
    per_token = problem.model.activation_bytes_per_token()
    return _assembled(
        problem,
        costs,
        steps,
        compared=compare(steps, costs),
        memory=tuple({"activations": round(tokens * per_token)} for tokens in peak_activations(steps, costs)),
        layout={"parameters": _parameters(per_token)},
    )


def _with_participation(
    problem: Problem, batches: Iterator[Sequence[int]], time_limit: float, on_step: Callable[[Step], None]
) -> Plan:
    setting = problem.setting(validate_batch(next(batches)))
    quick, began = min(time_limit, CANDIDATE_SECONDS), time.thread_time()
    decision = decide(setting, seconds=DECISION_SECONDS, plan_seconds=quick)
    if decision is None:
        raise does_not_fit(setting, plan_seconds=quick)
    spent = (time.thread_time() - began) / decision.tried
    if time_limit > quick:
        again = plan_layout(setting, decision.best.layout, setting.batch, time_limit)
        if again is not None and again.seconds < decision.best.seconds:
            decision = replace(decision, best=again, bound=min(decision.bound, again.seconds))
    best = decision.best
    own, steps = [], []
    for number, batch in enumerate(itertools.chain([setting.batch], batches)):
        planned = best if number == 0 else plan_layout(setting, best.layout, batch, time_limit)
        if planned is None:
            raise UserError(
                f"step {number}, of {sum(batch)} tokens and sequences of up to {max(batch)}, does not fit the layout "
                f"that step 0 was given ({best.layout.kind}): lower --batch-tokens or --fix max_length"
            )
        step = world_step(planned.step, best.layout.ranks)
        check_step(step, world_costs(setting, planned))
        own.append(planned.step)
        steps.append(step)
        on_step(step)
    costs, layout = world_costs(setting, best), best.layout
    effects: list[Effect] = []
    if spent < EFFECT_SECONDS:  # else each would take as long
        limit = min(time_limit, EFFECT_PLAN_SECONDS)
        effects = host_effects(setting, decision, seconds=EFFECT_SECONDS, plan_seconds=limit)
    memory = rank_memory(setting, layout, peak_activations(steps, costs), steps)
    return _assembled(
        problem,
        costs,
        steps,
        compared=compare(own, best.costs),
        memory=tuple({kind: round(size) for kind, size in asdict(m).items()} for m in memory),
        layout={
            "parameters": _parameters(round(layout.tokens.per_pass), layout),
            "ownership": ownership_json(setting, decision, effects),
        },
        lost=[Rejected(what=ON_ALL_HOSTS, why=f"short by {s.words}") for s in replicated_short(setting)],
    )


def _assembled(
    problem: Problem,
    costs: Costs,
    steps: Sequence[Step],
    *,
    compared: Sequence[LayoutComparison],
    memory: tuple[dict[str, int], ...],
    layout: dict[str, object],
    lost: Sequence[Rejected] = (),
) -> Plan:
    placement, others = _placement(problem, costs, steps[0]) if unlike_hosts(problem.cluster) else ({}, ())
    peaks = tuple(sum(size for kind, size in own.items() if kind != "context") for own in memory)
    return Plan(
        cluster=PlannedCluster(fingerprint=problem.cluster.fingerprint, ranks=problem.cluster.ranks),
        model=problem.model.name,
        layout={**layout, **_basis(problem, costs, compared), **placement},
        steps=tuple(steps),
        memory_bytes=peaks,
        memory=memory if problem.source == ANALYTIC else (),
        rejected=(*(Rejected(what=c.what, why=c.why) for c in compared), *lost, *others),
    )


def unlike_hosts(cluster: Cluster) -> bool:
    """Returns whether it matters which hosts form which stage: several fabrics, unequal devices or NICs."""
    return len({(host.fabric, host.nics, host.device) for host in cluster.hosts}) > 1


def _placement(problem: Problem, costs: Costs, step: Step) -> tuple[dict[str, object], tuple[Rejected, ...]]:
    """Places stages for a step's batch; returns the layout's entries and what they were compared with.

    Nothing that runs splits tensors: degree 1 only.
    """
    resources, checkpointing = cluster_resources(problem.cluster), bool(problem.fixes.checkpointing)
    works = workloads(problem.model, costs, step.batch, checkpointing=checkpointing)
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


def _parameters(per_token: int, layout: WeightLayout | None = None) -> dict[str, object]:
    """Returns how parameters are kept. layout: None where costs are not ours: how states are kept is not known then."""
    states, kept = 0.0, "replicated on every rank, gradients summed once a step"
    optimizer = "as in the run that was measured"
    if layout is not None:
        ranks = f"{len(layout.fractions)} ranks"
        states = max(m.states - m.context for m in layout.memory.values())
        kept = f"sharded over {ranks}, gathered layer by layer where not resident" if layout.sharded else kept
        optimizer = "whole on every rank" if layout.kind == REPLICATED else f"sharded over {ranks}"
    return {
        "kept": kept,
        "optimizer": optimizer,
        "state_bytes_per_rank": round(states) or None,
        "activation_bytes_per_token": per_token,
        "checkpointing": layout.checkpointing if layout else None,
    }


def _basis(problem: Problem, costs: Costs, compared: Sequence[LayoutComparison]) -> dict[str, object]:
    return {
        "static_seconds_per_step": {c.what: c.seconds for c in compared},
        "fixed": {key: value for key, value in asdict(problem.fixes).items() if value is not None},
        "cost_source": problem.source,
        "costs": costs_to_json(costs),
    }
