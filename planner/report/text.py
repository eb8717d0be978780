"""A plan as text: aligned columns of ASCII, the same on a terminal and in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from heteromesh.planner.cost.json import costs_of_plan
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Plan, Step
from heteromesh.planner.report.assemble import ANALYTIC, Problem, peak_activations
from heteromesh.planner.report.ownership_text import ownership_sections
from heteromesh.planner.report.tables import rank_list, table
from heteromesh.planner.sequences.timeline import starts
from heteromesh.planner.stages.json import STAGES

PASSES_SHOWN = 16
"""Rows of the first step's table; all passes are in the plan file."""


def plan_text(plan: Plan, problem: Problem, lengths: str) -> str:
    """Returns what `heteromesh plan` prints; `lengths` says where the lengths come from."""
    costs = costs_of_plan(plan, "plan")
    sections = [
        _header(problem, costs, lengths),
        *ownership_sections(plan),
        step_table(plan.steps, plan.cluster.ranks, working_ranks(plan)),
        first_passes(plan.steps[0], plan.cluster.ranks),
        *placement_section(plan),
        "\n".join([_memory(plan, problem, costs), *(f"Against  {r.what}: {r.why}" for r in plan.rejected)]),
        summary(plan),
    ]
    return "\n\n".join(sections)


def step_table(steps: Sequence[Step], ranks: int, working: int = 0) -> str:
    """Returns a table with one row a step. working: of the ranks; 0: all."""
    return table(_STEP_COLUMNS, [_step_row(i, step, ranks, working) for i, step in enumerate(steps)])


def placement_section(plan: Plan) -> list[str]:
    """Returns the stages that fit the network best, where the plan has them."""
    placement = plan.layout.get("placement")
    if placement is None:
        return []
    stages, predicted, counts = placement["stages"], placement["predicted"], placement["micro_batches"]
    rows = [
        (
            str(index),
            str(stage["layers"]),
            rank_list(stage["ranks"]),
            f"{max(predicted['memory_bytes'][r] for r in stage['ranks']) / 1e9:.1f}",
            f"{predicted['sum_seconds'][index]:.4g}",
        )
        for index, stage in enumerate(stages)
    ]
    low, high = min(counts), max(counts)
    title = (
        f"Placement  {placement['family']}: {len(stages)} stage{'s' if len(stages) > 1 else ''}, {len(counts)} "
        f"pipeline{'s' if len(counts) > 1 else ''} of {low if low == high else f'{low} to {high}'} micro-batches, "
        f"{predicted['seconds']:.4g} s for step 0's batch in even micro-batches, gap {predicted['gap']:.1%}"
    )
    staged = plan.layout.get("trains") == STAGES
    trains = f"`heteromesh run --plan` trains {'in these stages' if staged else 'by the steps above'}"
    return ["\n".join([title, table(("stage", "layers", "<ranks", "GB a rank", "gradient sum s"), rows), trains])]


def summary(plan: Plan) -> str:
    """Returns the last line: `Plan: ...`."""
    steps = plan.steps
    seconds, solve = _mean(s.seconds for s in steps), _mean(s.solve_seconds for s in steps)
    static = plan.layout["static_seconds_per_step"]
    words = [
        f"{len(steps)} step{'s' if len(steps) > 1 else ''} on {plan.cluster.ranks} ranks",
        f"{seconds:.4g} s a step",
        f"gap {_mean(s.gap for s in steps):.1%}",
        *(f"{other / seconds:.2f}x the speed of {what}" for what, other in static.items() if other),
        f"solved in {solve * 1e3:.3g} ms a step",
    ]
    return "Plan: " + ", ".join(words)


def shape(step: Step) -> str:
    """Degrees of a step's passes, largest first, as in FlexSP's <32,16,8x2>."""
    degrees = Counter(len(p.ranks) for p in step.passes)
    return "<" + ",".join(f"{d}x{n}" if n > 1 else str(d) for d, n in sorted(degrees.items(), reverse=True)) + ">"


def imbalance(step: Step, ranks: int, working: int = 0) -> float:
    """End of the last rank over the mean seconds that ranks are busy; 1 is perfect. working: of the ranks; 0: all."""
    busy = busy_seconds(step, ranks)
    return max(starts(step.passes, ranks)[1]) * (working or ranks) / sum(busy)


def working_ranks(plan: Plan) -> int:
    """Returns how many ranks a plan gives work to."""
    return len(plan.layout["ownership"]["working"]) if "ownership" in plan.layout else plan.cluster.ranks


def busy_seconds(step: Step, ranks: int) -> list[float]:
    """Returns by rank the predicted seconds of its passes."""
    busy = [0.0] * ranks
    for p in step.passes:
        for rank in p.ranks:
            busy[rank] += p.seconds
    return busy


_STEP_COLUMNS = ("step", "seqs", "tokens", "longest", "seconds", "bound", "gap", "imbalance", "solve ms", "<passes")


def _step_row(index: int, step: Step, ranks: int, working: int) -> tuple[str, ...]:
    return (
        str(index),
        str(len(step.batch)),
        str(sum(step.batch)),
        str(max(step.batch)),
        f"{step.seconds:.4g}",
        f"{step.bound_seconds:.4g}",
        f"{step.gap:.1%}",
        f"{imbalance(step, ranks, working):.3f}",
        f"{step.solve_seconds * 1e3:.1f}",
        shape(step),
    )


def first_passes(step: Step, ranks: int, name: str = "Step 0") -> str:
    """Returns the passes of a step as a table, the first PASSES_SHOWN in their order."""
    begun, _ = starts(step.passes, ranks)
    rows = []
    for start, p in list(zip(begun, step.passes, strict=True))[:PASSES_SHOWN]:
        lengths = [step.batch[k] for k in p.sequences]
        most = max(p.tokens(member) for member in range(len(p.ranks)))
        rows.append(
            (
                f"{start:.4g}",
                f"{p.seconds:.4g}",
                str(len(p.ranks)),
                rank_list(p.ranks),
                p.method,
                str(len(lengths)),
                str(sum(lengths)),
                str(max(lengths)),
                str(most),
            )
        )
    heads = ("start", "seconds", "degree", "<ranks", "<method", "seqs", "tokens", "longest", "most on a rank")
    title = f"{name}: {len(step.passes)} passes in the order of their start"
    rest = len(step.passes) - len(rows)
    return "\n".join([title, table(heads, rows), *([f"... and {rest} more (all in -o or --json)"] if rest else [])])


def _header(problem: Problem, costs: Costs, lengths: str) -> str:
    cluster, model = problem.cluster, problem.model
    devices = Counter(cluster.device_name(rank) for rank in range(cluster.ranks))
    kinds = ", ".join(f"{count} x {name}" for name, count in devices.items())
    hosts = f"{len(cluster.hosts)} host{'s' if len(cluster.hosts) > 1 else ''}"
    fits = [n for n in costs.capacity if n]
    low, high = min(fits), max(fits)
    methods = ", ".join(m.name for m in costs.methods) or "none, every sequence stays on one rank"
    return "\n".join(
        (
            f"Cluster  {cluster.name}: {hosts}, {cluster.ranks} ranks ({kinds}), fingerprint {cluster.fingerprint}",
            f"Model    {model.name}: {model.parameters() / 1e9:.3g} B parameters, "
            f"{model.layers} layers of width {model.hidden}",
            f"Costs    {problem.source}: {low if low == high else f'{low} to {high}'} tokens fit a device; "
            f"ways to split: {methods}",
            f"Lengths  {lengths}",
        )
    )


def _memory(plan: Plan, problem: Problem, costs: Costs) -> str:
    peaks = peak_activations(plan.steps, costs)
    shares = [tokens / capacity if capacity else 0.0 for tokens, capacity in zip(peaks, costs.capacity, strict=True)]
    fullest = max(range(len(shares)), key=lambda r: shares[r])
    what = "weights, gradients, optimizer and activations" if problem.source == ANALYTIC else "activations alone"
    return (
        f"Memory   rank {fullest} is fullest: activations of {peaks[fullest]:.0f} tokens where "
        f"{costs.capacity[fullest]} fit "
        f"({shares[fullest]:.0%}); at most {max(plan.memory_bytes) / 1e9:.1f} GB a rank ({what})"
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
