"""A run beside its plan: what was predicted, what was measured, and which ranks were slower than predicted."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner import files
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.cost.json import costs_from_json
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Step, step_from_json
from heteromesh.planner.report.methods import PassKind, pass_kinds
from heteromesh.planner.report.tables import table
from heteromesh.planner.report.text import busy_seconds, shape
from heteromesh.planner.report.why import explain_step

SLOW = 1.1
"""A rank whose measured / predicted is this many times the median rank's is named."""
SPEEDS_SHOWN = 16
STEPS_SHOWN = 20
KINDS_SHOWN = 4
"""Of split passes; --json has all."""


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A line of plan.jsonl."""

    step: int
    plan: Step
    seconds: float
    busy_seconds: tuple[float, ...]
    """Per rank, inside passes."""
    passes: tuple[tuple[int, int, float, int | None], ...]
    """(position in the step, rank, seconds, bytes that the rank sent; None where that was not counted)."""
    plan_wait_seconds: float
    correction: Correction | None
    """Of the run's costs, with which the step was planned."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The measured steps of a run, oldest first, and the costs as they were at its start."""

    steps: tuple[MeasuredStep, ...]
    costs: Costs
    left_out: int = 0
    """Steps of a run with fault tolerance that other ranks trained, or that lost some."""

    def costs_of(self, step: MeasuredStep) -> Costs:
        """Those that the step was planned with."""
        return step.correction.applied(self.costs) if step.correction else self.costs


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """One step; error = predicted / measured - 1."""

    step: int
    predicted: float
    measured: float
    error: float
    plan_wait_seconds: float
    passes: str


@dataclass(frozen=True, kw_only=True)
class RankComparison:
    """Busy seconds of a rank over the whole run."""

    rank: int
    predicted: float
    measured: float
    ratio: float
    """measured / predicted."""
    slow: bool


@dataclass(frozen=True, kw_only=True)
class DegreeComparison:
    """All passes of a degree, a pass on d ranks counting d times."""

    degree: int
    passes: int
    predicted: float
    measured: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class MethodComparison:
    """All passes of a method, summed over the ranks of each."""

    method: str
    passes: int
    predicted: float
    measured: float
    ratio: float
    predicted_bytes: int | None
    """Sent; None where the plan does not say."""
    counted_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the predicted seconds consist of, summed over the steps' critical ranks."""

    compute: float
    exchange: float
    fixed: float
    idle: float
    step_fixed: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole run."""

    steps: tuple[StepComparison, ...]
    ranks: tuple[RankComparison, ...]
    degrees: tuple[DegreeComparison, ...]
    methods: tuple[MethodComparison, ...]
    kinds: tuple[PassKind, ...]
    """What each method would have taken for every kind of split pass, under the last step's costs."""
    speeds: tuple[float, ...]
    """Of the ranks, as they were measured before the first step."""
    last_speeds: tuple[float, ...]
    """As the last step was planned with, corrected by what the steps before it took."""
    parts: Parts
    predicted: float
    measured: float
    median_error: float
    """Of the absolute errors."""
    p90_error: float
    plan_wait_share: float
    """Of the measured seconds."""
    left_out: int
    """Steps that are not compared, as their ranks were not those of the cost model."""


def read_run(directory: Path) -> Run:
    """The record of a run directory; the last line of plan.jsonl may be cut short by a kill.

    Raises UserError where plan.jsonl or config.json is missing or damaged, or no step was measured.
    """
    path = directory / "plan.jsonl"
    lines = files.read_text(path, "plan record").splitlines()
    steps: dict[int, MeasuredStep] = {}
    others: set[int] = set()
    for number, line in enumerate(lines, start=1):
        where = f"plan record {path} line {number}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"{where} is not JSON: remove that line") from None
        if not isinstance(data, dict) or data.get("measured") is not None:
            # A resumed run does some steps again: the later one stands.
            measured = _measured_step(data, where)
            steps[measured.step] = measured
            if data["measured"].get("repairs"):
                others.add(measured.step)
    if not steps:
        raise UserError(f"plan record {path} has no measured step yet: wait until the run has finished its first one")
    costs = _costs(directory / "config.json")
    alike = [steps[i] for i in sorted(steps) if i not in others and len(steps[i].busy_seconds) == costs.ranks]
    if not alike:
        raise UserError(
            f"no step of run {directory} was trained by {costs.ranks} ranks from its start to its end, as its cost "
            "model has it: `heteromesh report` shows such a run"
        )
    return Run(steps=tuple(alike), costs=costs, left_out=len(steps) - len(alike))


def _costs(path: Path) -> Costs:
    try:
        config = json.loads(files.read_text(path, "run configuration"))
        return costs_from_json(config["costs"], f"run configuration {path}: costs")
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"run configuration {path} has no cost model: give the run_dir of a run") from None


def _measured_step(data: Mapping[str, Any], where: str) -> MeasuredStep:
    try:
        measured = data["measured"]
        return MeasuredStep(
            step=int(data["step"]),
            plan=step_from_json(data["plan"], f"{where}: plan"),
            seconds=float(measured["seconds"]),
            busy_seconds=tuple(float(s) for s in measured["busy_seconds"]),
            passes=tuple(
                (int(p["position"]), int(p["rank"]), float(p["seconds"]), p.get("sent_bytes"))
                for p in measured["passes"]
            ),
            plan_wait_seconds=float(measured["plan_wait_seconds"]),
            correction=Correction(**data["correction"]) if "correction" in data else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not a measured step ({error!r}): it was written by another version") from None


def compare_run(run: Run) -> Comparison:
    """Predicted beside measured, by step, rank and degree."""
    steps = run.steps
    compared = tuple(
        StepComparison(
            step=s.step,
            predicted=s.plan.seconds,
            measured=s.seconds,
            error=s.plan.seconds / s.seconds - 1,
            plan_wait_seconds=s.plan_wait_seconds,
            passes=shape(s.plan),
        )
        for s in steps
    )
    errors = sorted(abs(c.error) for c in compared)
    measured = sum(c.measured for c in compared)
    return Comparison(
        steps=compared,
        ranks=_ranks(steps),
        degrees=_degrees(steps),
        methods=_methods(steps),
        kinds=pass_kinds((s.plan for s in steps), run.costs_of(steps[-1])),
        speeds=run.costs.speeds,
        last_speeds=run.costs_of(steps[-1]).speeds,
        parts=_parts(run),
        predicted=sum(c.predicted for c in compared),
        measured=measured,
        median_error=statistics.median(errors),
        p90_error=errors[-(-9 * len(errors) // 10) - 1],
        plan_wait_share=sum(c.plan_wait_seconds for c in compared) / measured,
        left_out=run.left_out,
    )


def _parts(run: Run) -> Parts:
    reasons = [explain_step(s.plan, run.costs_of(s)) for s in run.steps]
    return Parts(**{f.name: sum(getattr(r, f.name) for r in reasons) for f in fields(Parts)})


def _ranks(steps: Sequence[MeasuredStep]) -> tuple[RankComparison, ...]:
    world = max(len(s.busy_seconds) for s in steps)
    predicted, measured = [0.0] * world, [0.0] * world
    for s in steps:
        for rank, seconds in enumerate(busy_seconds(s.plan, len(s.busy_seconds))):
            predicted[rank] += seconds
            measured[rank] += s.busy_seconds[rank]
    ratios = [m / p if p else 1.0 for m, p in zip(measured, predicted, strict=True)]
    middle = statistics.median(ratios)
    return tuple(
        RankComparison(
            rank=rank, predicted=predicted[rank], measured=measured[rank], ratio=ratio, slow=ratio > SLOW * middle
        )
        for rank, ratio in enumerate(ratios)
    )


def _degrees(steps: Sequence[MeasuredStep]) -> tuple[DegreeComparison, ...]:
    sums: dict[int, list[float]] = {}
    counts: dict[int, set[tuple[int, int]]] = {}
    for s in steps:
        for position, _, seconds, _ in s.passes:
            planned = s.plan.passes[position]
            total = sums.setdefault(len(planned.ranks), [0.0, 0.0])
            total[0] += planned.seconds
            total[1] += seconds
            counts.setdefault(len(planned.ranks), set()).add((s.step, position))
    return tuple(
        DegreeComparison(degree=d, passes=len(counts[d]), predicted=p, measured=m, ratio=m / p)
        for d, (p, m) in sorted(sums.items())
    )


def _methods(steps: Sequence[MeasuredStep]) -> tuple[MethodComparison, ...]:
    rows: dict[str, list[tuple[int, float, float, int | None, int | None]]] = {}
    for s in steps:
        for position, rank, seconds, counted in s.passes:
            p = s.plan.passes[position]
            member = p.ranks.index(rank)
            said = p.sent_bytes[member] if p.sent_bytes else None
            rows.setdefault(p.method, []).append((int(member == 0), p.seconds, seconds, said, counted))
    compared = []
    for method, entries in sorted(rows.items()):
        firsts, predicted, measured, planned, sent = zip(*entries, strict=True)
        compared.append(
            MethodComparison(
                method=method,
                passes=sum(firsts),
                predicted=sum(predicted),
                measured=sum(measured),
                ratio=sum(measured) / sum(predicted),
                predicted_bytes=None if None in planned else sum(n or 0 for n in planned),
                counted_bytes=None if None in sent else sum(n or 0 for n in sent),
            )
        )
    return tuple(compared)


def methods_text(kinds: Sequence[PassKind]) -> str:
    """The seconds of every method for the costliest kinds of split passes; empty where no pass is split."""
    rows: list[tuple[str, ...]] = []
    for kind in kinds[:KINDS_SHOWN]:
        for option in kind.options:
            chosen = "*" if option.method == kind.method else ""
            head = (str(kind.degree), str(kind.longest), str(kind.passes)) if chosen else ("", "", "")
            if option.seconds is None:
                rows.append((*head, chosen, option.method, "-", "-", "-", "-", "-", option.obstacle or ""))
                continue
            sent = "-" if option.sent_bytes is None else f"{option.sent_bytes / 1e6:.4g}"
            parts = (option.seconds, option.compute, option.exchange, option.latency)
            rows.append((*head, chosen, option.method, *(f"{x:.4g}" for x in parts), sent, ""))
    if not rows:
        return ""
    heads = ("degree", "longest", "passes", "<", "<method", "seconds", "compute", "exchange", "latency", "MB sent", "<")
    return (
        "Methods of split passes (* chosen): seconds of the costliest pass of each kind; exchange and latency are what "
        "compute does not hide\n" + table(heads, rows)
    )


def _speeds_text(run: Comparison) -> str:
    """Empty where no step corrected them."""
    if run.speeds == run.last_speeds:
        return ""
    pairs = [f"{r} {v:g} -> {w:g}" for r, (v, w) in enumerate(zip(run.speeds, run.last_speeds, strict=True)) if v != w]
    shown = ", ".join(pairs[:SPEEDS_SHOWN]) + (f" and {len(pairs) - SPEEDS_SHOWN} more" * (len(pairs) > SPEEDS_SHOWN))
    return f"Speeds of ranks, measured before the first step -> in the last step's plan: {shown}"


def _title(run: Comparison, shown: int) -> str:
    text = f"Run      {len(run.steps)} steps"
    if run.left_out:
        text += f" ({run.left_out} more, which other ranks trained or some left, are in `heteromesh report`)"
    return text + (f", the last {shown}:" if shown < len(run.steps) else "")


def _steps_text(shown: Sequence[StepComparison]) -> str:
    rows = [
        (
            str(s.step),
            f"{s.predicted:.4g}",
            f"{s.measured:.4g}",
            f"{s.error:+.1%}",
            f"{s.plan_wait_seconds * 1e3:.2g}",
            s.passes,
        )
        for s in shown
    ]
    return table(("step", "predicted s", "measured s", "error", "plan wait ms", "<passes"), rows)


def _methods_text(run: Comparison) -> str:
    rows = [
        (
            *(m.method, str(m.passes), f"{m.predicted:.4g}", f"{m.measured:.4g}", f"{m.ratio:.3f}"),
            *("-" if n is None else str(n) for n in (m.predicted_bytes, m.counted_bytes)),
        )
        for m in run.methods
    ]
    seconds = ("passes", "predicted rank-s", "measured rank-s", "ratio")
    return table(("<method", *seconds, "predicted bytes", "counted bytes"), rows)


def comparison_text(run: Comparison) -> str:
    """What `heteromesh explain RUN_DIR` prints."""
    shown = run.steps[-STEPS_SHOWN:]
    ranks = [
        (str(r.rank), f"{r.predicted:.4g}", f"{r.measured:.4g}", f"{r.ratio:.3f}", "slower than the others" * r.slow)
        for r in run.ranks
    ]
    degrees = [
        (str(d.degree), str(d.passes), f"{d.predicted:.4g}", f"{d.measured:.4g}", f"{d.ratio:.3f}") for d in run.degrees
    ]
    p = run.parts
    slow = [str(r.rank) for r in run.ranks if r.slow]
    return "\n\n".join(
        section
        for section in (
            _title(run, len(shown)) + "\n" + _steps_text(shown),
            table(("rank", "predicted busy s", "measured busy s", "ratio", "<"), ranks),
            _speeds_text(run),
            table(("degree", "passes", "predicted rank-s", "measured rank-s", "ratio"), degrees),
            _methods_text(run),
            methods_text(run.kinds),
            f"Predicted {run.predicted:.4g} s of the critical ranks = compute {p.compute:.4g} + "
            f"exchange {p.exchange:.4g} + fixed {p.fixed:.4g} + idle {p.idle:.4g} + end of step {p.step_fixed:.4g}",
            f"Total: predicted {run.predicted:.4g} s, measured {run.measured:.4g} s "
            f"({run.predicted / run.measured - 1:+.1%}); absolute error of a step: median {run.median_error:.1%}, "
            f"p90 {run.p90_error:.1%}; waited for plans {run.plan_wait_share:.2%}; "
            f"slow ranks: {', '.join(slow) or 'none'}",
        )
        if section
    )
