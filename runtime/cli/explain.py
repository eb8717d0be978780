"""`heteromesh explain`: why a plan is as it is, or how a run went against its plan. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from heteromesh.planner import plan as plans
from heteromesh.planner.cost.json import costs_of_plan
from heteromesh.planner.plan import Plan
from heteromesh.planner.report.check import check_step
from heteromesh.planner.report.methods import PassKind, pass_kinds
from heteromesh.planner.report.ownership_text import ownership_sections
from heteromesh.planner.report.tables import rank_list, table
from heteromesh.planner.report.text import imbalance, shape, working_ranks
from heteromesh.planner.report.why import PassReason, StepReason, explain_step
from heteromesh.runtime.cli.arguments import Parser
from heteromesh.runtime.cli.terminal import say
from heteromesh.runtime.report.compare import compare_run, comparison_text, methods_text, read_run

PASSES_SHOWN = 8
"""Of the first step, those that cost most; --json has all of every step."""


def main(argv: Sequence[str]) -> int:
    """Explains a plan file or a run directory; returns the exit code."""
    parser = Parser("explain", "Says why a plan is as it is; for a run directory, predicted beside measured.")
    parser.add_argument("path", type=Path, metavar="plan.json | RUN_DIR")
    parser.add_argument("--json", action="store_true", help="one JSON document and nothing else")
    args = parser.parse(argv)
    if args.path.is_dir():
        comparison = compare_run(read_run(args.path))
        print(json.dumps(asdict(comparison))) if args.json else say(comparison_text(comparison))
        return 0
    plan = plans.load(args.path)
    reasons = explain_plan(plan, str(args.path))
    kinds = pass_kinds(plan.steps, costs_of_plan(plan, str(args.path)))
    if args.json:
        rejected = [asdict(r) for r in plan.rejected]
        methods = [asdict(kind) for kind in kinds]
        steps = [asdict(r) for r in reasons]
        told = {"ownership": plan.layout["ownership"]} if "ownership" in plan.layout else {}
        document = {"model": plan.model, "steps": steps, "methods": methods, "rejected": rejected}
        print(json.dumps(document | told | ({"memory": plan.memory} if plan.memory else {})))
    else:
        say(plan_reasons_text(plan, reasons, kinds))
    return 0


def explain_plan(plan: Plan, where: str) -> list[StepReason]:
    """Returns the reasons of every step. Raises UserError where the plan carries no cost model."""
    costs = costs_of_plan(plan, where)
    for step in plan.steps:
        check_step(step, costs)
    return [explain_step(step, costs) for step in plan.steps]


def plan_reasons_text(plan: Plan, reasons: Sequence[StepReason], kinds: Sequence[PassKind]) -> str:
    """Returns what `heteromesh explain plan.json` prints."""
    rows = []
    for index, (step, why) in enumerate(zip(plan.steps, reasons, strict=True)):
        parts = (why.seconds, why.compute, why.exchange, why.fixed, why.idle, why.step_fixed)
        rows.append(
            (
                str(index),
                *(f"{s:.4g}" for s in parts),
                str(why.critical_rank),
                f"{step.gap:.1%}",
                f"{imbalance(step, plan.cluster.ranks, working_ranks(plan)):.3f}",
                shape(step),
            )
        )
    heads = ("step", "seconds", "= compute", "+ exchange", "+ fixed", "+ idle", "+ end", "of rank", "gap", "imbalance")
    first, why = plan.steps[0], reasons[0]
    costly = sorted(why.passes, key=lambda p: (-p.rank_seconds, p.position))[:PASSES_SHOWN]
    sections = [
        f"Plan     {plan.model} on {plan.cluster.ranks} ranks, {len(plan.steps)} steps; seconds of a step are its "
        "critical rank's (the last to end)",
        *ownership_sections(plan),
        table((*heads, "<passes"), rows),
        f"Step 0: the {len(costly)} costliest of {len(first.passes)} passes, and what other degrees would cost",
        "\n\n".join(_pass_text(p) for p in costly),
        methods_text(kinds),
        "\n".join(f"Rejected  {r.what}: {r.why}" for r in plan.rejected),
    ]
    return "\n\n".join(section for section in sections if section)


def _pass_text(why: PassReason) -> str:
    what = f"{why.sequences} sequence{'s' if why.sequences > 1 else ''}, {why.tokens} tokens, longest {why.longest}"
    lines = [f"  pass {why.position}: ranks {rank_list(why.ranks)}, {why.method}; {what}; {why.reason}"]
    for option in why.options:
        chosen = "*" if option.degree == len(why.ranks) else " "
        if option.seconds is None:
            lines.append(f"   {chosen} degree {option.degree:>3}: {option.obstacle}")
        else:
            lines.append(
                f"   {chosen} degree {option.degree:>3}: {option.seconds:.4g} s x {option.degree} = "
                f"{option.seconds * option.degree:.4g} rank-seconds ({option.method})"
            )
    return "\n".join(lines)
