"""What a run directory tells of a run: steps, ranks, members, events, delays. Never imports torch.

Every file may be missing and its last line cut short: a run that was killed, or one that goes on, is reported too.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heteromesh.errors import UserError

FILES = ("metrics.jsonl", "plan.jsonl", "events.jsonl")
_HUGE = 1e100


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """One step; None for what was not written. Seconds."""

    step: int
    predicted: float | None
    measured: float | None
    loss: float | None
    tokens: float | None
    plan_wait: float | None
    data_wait: float | None
    exposed_comm: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """A rank over all steps in plan.jsonl in which it took part."""

    rank: int
    steps: int
    busy: float
    wait: float
    """Seconds of those steps in which it was not in a pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stay:
    """A member from when it joined until it was lost. Seconds since the first event."""

    member: int
    name: str
    address: str
    joined: float
    lost: float | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Delays:
    """The delay matrix at one time: seconds for a byte from row to column; None where too little was sent to tell."""

    at: float
    """Seconds since the first event."""
    group: str
    names: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    blocked: tuple[float | None, ...]
    """Share of the time that each member waited in collectives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The run in a few numbers."""

    steps: int
    first_step: int | None
    last_step: int | None
    first_loss: float | None
    last_loss: float | None
    tokens: float
    seconds: float
    predicted: float
    """Of the steps that have both."""
    median_error: float | None
    """Of |predicted / measured - 1|."""
    members: int
    losses_of_members: int
    diagnoses: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """Everything that the report shows."""

    directory: str
    settings: Mapping[str, Any]
    """From config.json: ranks, cluster, compression and the trainer's settings."""
    summary: Summary
    steps: tuple[StepFacts, ...]
    ranks: tuple[RankFacts, ...]
    stays: tuple[Stay, ...]
    events: tuple[Mapping[str, Any], ...]
    """Those of events.jsonl but for the matrices, each with `at`, seconds since the first."""
    delays: tuple[Delays, ...]
    unreadable_lines: int


def read_facts(directory: Path) -> RunFacts:
    """Raises UserError where there is no directory, or nothing of a run in it."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"run directory {directory} {what}: give the run_dir of a run")
    metrics, plans, events = (_lines(directory / name) for name in FILES)
    if not (metrics.entries or plans.entries or events.entries):
        raise UserError(
            f"run directory {directory} holds no step and no event: give the run_dir of a run that has begun"
        )
    steps = _steps(metrics.entries, plans.entries)
    timed = _timed(events.entries)
    stays = _stays(timed)
    return RunFacts(
        directory=str(directory),
        settings=_settings(directory / "config.json"),
        summary=_summary(steps, stays, timed),
        steps=steps,
        ranks=_ranks(plans.entries),
        stays=stays,
        events=tuple(e for e in timed if e["kind"] != "records"),
        delays=tuple(d for e in timed if e["kind"] == "records" and (d := _delays(e)) is not None),
        unreadable_lines=metrics.unreadable + plans.unreadable + events.unreadable,
    )


@dataclass(frozen=True, slots=True)
class _Lines:
    entries: list[dict[str, Any]]
    unreadable: int
    """Without the last one, which a kill may have cut short."""


def _lines(path: Path) -> _Lines:
    if not path.exists():
        return _Lines([], 0)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check its permissions") from None
    entries, unreadable = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line, parse_constant=lambda _: None, parse_float=_finite_float)
        except (ValueError, RecursionError):
            unreadable += number < len(lines)
            continue
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            unreadable += 1
    return _Lines(entries, unreadable)


def _finite_float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _settings(path: Path) -> dict[str, Any]:
    """Flat, in the order of the file; empty where it is missing or damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    cluster = config.get("cluster")
    found = {"ranks": config.get("ranks"), "gradient_compression": config.get("gradient_compression")}
    found["cluster"] = cluster.get("name") if isinstance(cluster, dict) else None
    trainer = config.get("trainer")
    found = (trainer if isinstance(trainer, dict) else {}) | {k: v for k, v in found.items() if v is not None}
    return {k: v for k, v in found.items() if isinstance(v, str | int | float) and _finite(v) and k != "run_dir"}


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def number(value: object) -> float | None:
    """A finite number, or None for anything else, as one that no run measures and that would make sums overflow."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_HUGE < value < _HUGE else None


def _table(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def _index(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _steps(metrics: Iterable[Mapping[str, Any]], plans: Iterable[Mapping[str, Any]]) -> tuple[StepFacts, ...]:
    """By step; a resumed run does some again, and the later ones stand."""
    found: dict[int, dict[str, float | None]] = {}
    for line in plans:
        step = _index(line.get("step"))
        plan, measured = _table(line, "plan"), _table(line, "measured")
        if step is not None:
            found[step] = {
                "predicted_seconds": number(plan.get("seconds")),
                "measured_seconds": number(measured.get("seconds")),
                "plan_wait_seconds": number(measured.get("plan_wait_seconds")),
            }
    for line in metrics:
        step = _index(line.get("step"))
        if step is not None:
            told = {key: number(value) for key, value in line.items()}
            found[step] = found.get(step, {}) | {k: v for k, v in told.items() if v is not None}
    return tuple(
        StepFacts(
            step=step,
            predicted=told.get("predicted_seconds"),
            measured=told.get("measured_seconds"),
            loss=told.get("loss"),
            tokens=told.get("tokens"),
            plan_wait=told.get("plan_wait_seconds"),
            data_wait=told.get("data_wait_seconds"),
            exposed_comm=told.get("exposed_comm_seconds"),
        )
        for step, told in sorted(found.items())
    )


def _ranks(plans: Iterable[Mapping[str, Any]]) -> tuple[RankFacts, ...]:
    sums: dict[int, list[float]] = {}
    for line in plans:
        measured = line.get("measured")
        if not isinstance(measured, dict) or not isinstance(measured.get("busy_seconds"), list):
            continue
        seconds = number(measured.get("seconds"))
        for rank, value in enumerate(measured["busy_seconds"]):
            busy = number(value)
            if busy is not None and seconds is not None:
                entry = sums.setdefault(rank, [0, 0.0, 0.0])
                entry[0] += 1
                entry[1] += busy
                entry[2] += max(0.0, seconds - busy)
    return tuple(RankFacts(rank=r, steps=int(n), busy=busy, wait=wait) for r, (n, busy, wait) in sorted(sums.items()))


def _timed(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those with a time and a kind, in the order of the file."""
    known = [e for e in events if number(e.get("time")) is not None and isinstance(e.get("kind"), str)]
    start = min((float(e["time"]) for e in known), default=0.0)
    return [{"at": round(float(e["time"]) - start, 3), **e} for e in known]


def _stays(events: Iterable[Mapping[str, Any]]) -> tuple[Stay, ...]:
    open_: dict[int, Stay] = {}
    done: list[Stay] = []
    for event in events:
        member = _index(event.get("member"))
        if member is None:
            continue
        if event["kind"] == "joined":
            if member in open_:  # another coordinator counts the same members again
                continue
            name, address = str(event.get("name", "")), str(event.get("address", ""))
            open_[member] = Stay(member=member, name=name, address=address, joined=event["at"], lost=None, reason="")
        elif event["kind"] == "lost" and member in open_:
            done.append(replace(open_.pop(member), lost=event["at"], reason=str(event.get("reason", ""))))
    return tuple(sorted([*done, *open_.values()], key=lambda s: (s.joined, s.member)))


def _delays(event: Mapping[str, Any]) -> Delays | None:
    names, rows = event.get("names"), event.get("delays")
    if not isinstance(names, list) or not isinstance(rows, list) or len(names) != len(rows):
        return None
    if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return None
    seconds, blocked = event.get("seconds"), event.get("blocked")
    return Delays(
        at=event["at"],
        group=str(event.get("group", "")),
        names=tuple(str(name) for name in names),
        matrix=tuple(tuple(number(cell) for cell in row) for row in rows),
        blocked=_shares(blocked, seconds, len(names)),
    )


def _shares(parts: object, wholes: object, size: int) -> tuple[float | None, ...]:
    if not isinstance(parts, list) or not isinstance(wholes, list) or not len(parts) == len(wholes) == size:
        return (None,) * size
    pairs = [(number(a), number(b)) for a, b in zip(parts, wholes, strict=True)]
    return tuple(None if a is None or not b else min(1.0, a / b) for a, b in pairs)


def _summary(steps: Sequence[StepFacts], stays: Sequence[Stay], events: Sequence[Mapping[str, Any]]) -> Summary:
    both = [(s.predicted, s.measured) for s in steps if s.predicted is not None and s.measured]
    losses = [s.loss for s in steps if s.loss is not None]
    errors = [abs(p / m - 1) for p, m in both if p is not None and m is not None]
    return Summary(
        steps=len(steps),
        first_step=steps[0].step if steps else None,
        last_step=steps[-1].step if steps else None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        tokens=sum(s.tokens or 0 for s in steps),
        seconds=sum(s.measured or 0 for s in steps),
        predicted=sum(p for p, _ in both if p is not None),
        median_error=statistics.median(errors) if errors else None,
        members=len({s.member for s in stays}),
        losses_of_members=sum(s.lost is not None and s.reason != "left" for s in stays),
        diagnoses=sum(e["kind"] == "diagnosis" for e in events),
    )
