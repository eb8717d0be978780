"""Plays the steps of a plan: every rank runs its passes in order, and a pass starts when all its members are there.

Without a disturbance the seconds of a step are exactly those of the plan (planner.timeline is the one definition). A
slow rank stretches the compute of its passes; a rank that fails never joins another pass, so the passes that name it,
and everything behind them, don't run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from heteromesh.planner.cost.passes import Costs, dealt_pairs, load_of
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.timeline import starts

Category = Literal["pass", "comm", "wait", "optimizer"]


@dataclass(frozen=True, slots=True)
class SimulatedEvent:
    """What a rank does for some time."""

    rank: int
    name: str
    category: Category
    start: float
    """Seconds from the start of the first simulated step."""
    seconds: float
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What goes otherwise than planned."""

    slow: Mapping[int, float] = field(default_factory=dict)
    """How many times as long a rank's compute takes."""
    fail: tuple[int, int] | None = None
    """(rank, step): gone when that step starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """One simulated step."""

    step: int
    seconds: float | None
    """None where the step can't finish."""
    planned_seconds: float
    busy: tuple[float, ...]
    """Per rank, seconds in passes."""
    wait: tuple[float, ...]
    """Per rank, seconds in which it waits for others: for members of its next pass, or for the gradient sum."""
    not_run: tuple[int, ...]
    """Positions of the passes that never start."""
    stuck: tuple[int, ...]
    """Ranks that wait for the failed one, directly or not, when the others have done all they can."""
    events: tuple[SimulatedEvent, ...] = field(repr=False)


def simulate_plan(steps: Sequence[Step], costs: Costs, disturbance: Disturbance) -> list[StepRun]:
    """Simulates the steps one after the other, up to the first that can't finish."""
    runs: list[StepRun] = []
    clock = 0.0
    for index, step in enumerate(steps):
        gone = disturbance.fail[0] if disturbance.fail and disturbance.fail[1] == index else None
        runs.append(simulate_step(step, costs, disturbance.slow, gone, index=index, clock=clock))
        last = runs[-1].seconds
        if last is None:
            break
        clock += last
    return runs


def simulate_step(
    step: Step, costs: Costs, slow: Mapping[int, float], gone: int | None = None, *, index: int = 0, clock: float = 0.0
) -> StepRun:
    """Simulates one step. gone: a rank that is not there; clock: when the step starts."""
    blocked, dead = [], set() if gone is None else {gone}
    for position, p in enumerate(step.passes):
        if dead.intersection(p.ranks):
            dead.update(p.ranks)
            blocked.append(position)
    passes = [replace(p, seconds=slowed_seconds(p, step.batch, costs, slow)) for p in step.passes]
    # blocked passes take no time here, and nothing that runs comes after one of them
    ran = [replace(p, seconds=0.0) if i in blocked else p for i, p in enumerate(passes)]
    begun, ends = starts(ran, costs.ranks)
    last = max(ends)
    fixed = costs.traffic.step_seconds(ran, ends) - last + costs.seconds_per_step
    events, busy, free = [], [0.0] * costs.ranks, [0.0] * costs.ranks
    for position, (start, p) in enumerate(zip(begun, ran, strict=True)):
        for rank in p.ranks if position not in blocked else ():
            events += _waits(rank, free[rank], start, clock, index)
            events.append(SimulatedEvent(rank, f"pass {position}", "pass", clock + start, p.seconds, index))
            busy[rank] += p.seconds
            free[rank] = start + p.seconds
    alive = [r for r in range(costs.ranks) if r != gone]
    for rank in alive:
        events += _waits(rank, free[rank], last, clock, index)
        if gone is None and fixed:
            events.append(SimulatedEvent(rank, "gradient sum and optimizer", "optimizer", clock + last, fixed, index))
    return StepRun(
        step=index,
        seconds=last + fixed if gone is None else None,
        planned_seconds=step.seconds,
        busy=tuple(busy),
        wait=tuple(last - b if r in alive else 0.0 for r, b in enumerate(busy)),
        not_run=tuple(blocked),
        stuck=tuple(sorted(dead - {gone})) if gone is not None else (),
        events=tuple(events),
    )


def slowed_seconds(p: Pass, batch: Sequence[int], costs: Costs, slow: Mapping[int, float]) -> float:
    """Returns seconds of a pass whose ranks compute so much slower with the same shards and heads; exchanges stay as
    planned.

    An upper estimate where the slow rank's own exchanges are shorter than the slowest's.
    """
    if not any(slow.get(rank, 1.0) != 1.0 for rank in p.ranks):
        return p.seconds
    load, speeds = load_of([batch[k] for k in p.sequences], p.shards), [costs.speeds[r] for r in p.ranks]
    method = costs.method(p.method) if len(p.ranks) > 1 else None
    pairs = dealt_pairs(method, load, speeds) if method else load.pairs
    work = method.work if method else 1.0
    own = [
        (costs.seconds_per_token2 * n2 + costs.seconds_per_token * n) * work / v
        for n2, n, v in zip(pairs, load.tokens, speeds, strict=True)
    ]
    return p.seconds + max(t * slow.get(r, 1.0) for r, t in zip(p.ranks, own, strict=True)) - max(own)


def _waits(rank: int, since: float, until: float, clock: float, index: int) -> list[SimulatedEvent]:
    if until <= since or math.isclose(until, since, rel_tol=1e-9):
        return []
    return [SimulatedEvent(rank, "wait", "wait", clock + since, until - since, index)]
