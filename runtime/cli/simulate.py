"""`heteromesh simulate`: plays a plan without any device, with slow or failing ranks. Never imports torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heteromesh.comm.records import Span
from heteromesh.errors import UserError
from heteromesh.planner import plan as plans
from heteromesh.planner.cost.json import costs_of_plan
from heteromesh.planner.plan import Plan
from heteromesh.planner.report.check import check_feasible
from heteromesh.planner.report.simulate import Disturbance, SimulatedEvent, StepRun, simulate_plan
from heteromesh.planner.report.simulate_nics import shared_nic_seconds
from heteromesh.planner.report.simulate_placement import PlacementRun, simulate_placement
from heteromesh.planner.report.tables import rank_list, table
from heteromesh.planner.stages.json import Basis, basis_from_json
from heteromesh.runtime.cli.arguments import Parser
from heteromesh.runtime.cli.output import check_writable, writing
from heteromesh.runtime.cli.terminal import say
from heteromesh.runtime.records.trace import write_trace

RANKS_SHOWN = 32
TODAY = (
    "the step can't finish: its gradient sum waits for the rank that is gone; today the other ranks "
    "then end within half a minute, and the job resumes from its last checkpoint"
)


def main(argv: Sequence[str]) -> int:
    """Simulates, prints and writes; returns the exit code."""
    args = _parse(argv)
    plan = plans.load(args.plan)
    costs, basis = costs_of_plan(plan, str(args.plan)), _placement(plan, args.plan)
    for step in plan.steps:
        check_feasible(step, costs)
    disturbance = _disturbance(args, plan)
    if args.output:
        check_writable(args.output)
    runs = simulate_plan(plan.steps, costs, disturbance)
    shared = [shared_nic_seconds(plan.steps[run.step], costs, disturbance.slow) for run in runs if run.seconds]
    staged = None
    if basis and not disturbance.fail:
        staged = simulate_placement(basis.placement, basis.resources, basis.work, disturbance.slow)
    if args.output:
        _trace(args.output, [e for run in runs for e in run.events])
        if staged:
            _trace(args.output.with_stem(f"{args.output.stem}-placement"), staged.events)
    if args.json:
        print(json.dumps(_document(runs, shared, staged, disturbance)))
    else:
        say(_text(plan, runs, shared, basis, staged, disturbance))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("simulate", "Plays the steps of a plan without any device: who computes, who waits, for how long.")
    add = parser.add_argument
    add("plan", type=Path, metavar="plan.json", help="what `heteromesh plan -o` wrote")
    add("--slow", action="append", default=[], metavar="RANK=FACTOR", help="its compute takes FACTOR times as long")
    add("--fail", action="append", default=[], metavar="RANK@STEP", help="the rank is gone when that step starts")
    add("-o", "--output", type=Path, metavar="trace.json", help="write a trace for ui.perfetto.dev")
    add("--json", action="store_true", help="one JSON document and nothing else")
    return parser.parse(argv)


def _disturbance(args: argparse.Namespace, plan: Plan) -> Disturbance:
    slow: dict[int, float] = {}
    for text in args.slow:
        rank, _, factor = text.partition("=")
        try:
            value = float(factor)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--slow {text}: the factor must be a number above 0, as in --slow 3=2.5")
        number = _below(rank, plan.cluster.ranks, f"--slow {text}", "rank")
        if number in slow:
            raise UserError(f"--slow {text}: rank {number} was given before: give each rank once")
        slow[number] = value
    fail = None
    if len(args.fail) > 1:
        raise UserError(f"--fail is given {len(args.fail)} times: one failure is played, so give it once")
    for text in args.fail:
        first, at, second = text.partition("@")
        where = f"--fail {text}"
        if not at:
            raise UserError(f"{where} names no step: write RANK@STEP, as in --fail 3@0")
        fail = _below(first, plan.cluster.ranks, where, "rank"), _below(second, len(plan.steps), where, "step")
    return Disturbance(slow=slow, fail=fail)


def _below(text: str, count: int, where: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= count:
        raise UserError(f"{where}: {what} {text!r} must be a whole number from 0 to {count - 1}: the plan has {count}")
    return int(text)


def _placement(plan: Plan, path: Path) -> Basis | None:
    data = plan.layout.get("placement")
    return None if data is None else basis_from_json(data, f"plan {path}: layout.placement")


def _trace(path: Path, events: Iterable[SimulatedEvent]) -> None:
    spans: dict[int, list[Span]] = {}
    for e in events:
        span = Span(e.name, e.category, round(e.start * 1e9), round(e.seconds * 1e9), e.step)
        spans.setdefault(e.rank, []).append(span)
    with writing(path):
        write_trace(path, spans)


def _document(
    runs: Sequence[StepRun], shared: Sequence[float | None], staged: PlacementRun | None, disturbance: Disturbance
) -> dict[str, Any]:
    steps = []
    for run, nics in zip(runs, [*shared, None], strict=False):
        data = {key: value for key, value in asdict(run).items() if key != "events"}
        steps.append(data | {"shared_nic_seconds": nics if run.seconds else None})
    placement = None
    if staged:
        placement = {key: value for key, value in asdict(staged).items() if key != "events"}
    slow = {str(rank): factor for rank, factor in disturbance.slow.items()}
    return {"slow": slow, "fail": disturbance.fail, "steps": steps, "placement": placement}


def _text(
    plan: Plan,
    runs: Sequence[StepRun],
    shared: Sequence[float | None],
    basis: Basis | None,
    staged: PlacementRun | None,
    disturbance: Disturbance,
) -> str:
    changes = [f"rank {rank} computes {factor:g}x as long" for rank, factor in disturbance.slow.items()]
    changes += [f"rank {disturbance.fail[0]} fails at step {disturbance.fail[1]}"] if disturbance.fail else []
    heads = ("step", "planned", "simulated", "ratio", "shared nics", "busy", "most wait", "<waits most")
    rows = [_row(run, nics) for run, nics in zip(runs, [*shared, None], strict=False)]
    sections = [
        f"Simulation  {plan.model} on {plan.cluster.ranks} ranks; {', '.join(changes) or 'nothing disturbs it'}",
        table(heads, rows),
        _ranks(runs[0], plan.cluster.ranks),
    ]
    if runs[-1].seconds is None and disturbance.fail:
        waiting = f"; ranks {rank_list(runs[-1].stuck)} wait for it in their passes" if runs[-1].stuck else ""
        gone = f"{len(runs[-1].not_run)} passes of step {runs[-1].step} never start{waiting}"
        sections.append(f"Failure  {gone}: {TODAY}")
    if staged and basis:
        sections.append(
            f"Placement  {len(basis.placement.stages)} stages, {len(basis.placement.micro_batches)} pipelines: "
            f"{staged.seconds:.4g} s a step, bubble {staged.bubble:.1%}, {staged.hidden_sum:.0%} of the gradient sums "
            "hidden under backward"
        )
    return "\n\n".join(sections)


def _row(run: StepRun, nics: float | None) -> tuple[str, ...]:
    most = max(range(len(run.wait)), key=lambda r: run.wait[r])
    share = sum(run.busy) / (sum(run.busy) + sum(run.wait)) if any(run.busy) else 0.0
    return (
        str(run.step),
        f"{run.planned_seconds:.4g}",
        "-" if run.seconds is None else f"{run.seconds:.4g}",
        "-" if run.seconds is None else f"{run.seconds / run.planned_seconds:.3f}",
        "-" if nics is None else f"{nics:.4g}",
        f"{share:.1%}",
        f"{run.wait[most]:.4g}",
        f"rank {most}",
    )


def _ranks(run: StepRun, ranks: int) -> str:
    order = sorted(range(ranks), key=lambda r: -run.busy[r])[:RANKS_SHOWN]
    rows = [(str(r), f"{run.busy[r]:.4g}", f"{run.wait[r]:.4g}") for r in order]
    rest = f"\n... and {ranks - len(order)} more (all with --json)" if ranks > len(order) else ""
    return f"Step {run.step}: seconds of each rank, the busiest first\n" + table(("rank", "busy", "wait"), rows) + rest
