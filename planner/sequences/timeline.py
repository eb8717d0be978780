"""When passes run: every rank runs the passes that name it in list order; a pass starts when all its ranks are free."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.splitting.traffic import pass_bytes


def starts(passes: Sequence[Pass], ranks: int) -> tuple[list[float], list[float]]:
    """Returns (start of every pass, end of every rank) in seconds from the start of the step."""
    free = [0.0] * ranks
    begun = []
    for p in passes:
        start = max(free[r] for r in p.ranks)
        begun.append(start)
        for r in p.ranks:
            free[r] = start + p.seconds
    return begun, free


def tokens_of(passes: Iterable[Pass], ranks: int) -> list[int]:
    """Returns by rank the tokens of all its passes."""
    held = [0] * ranks
    for p in passes:
        for rank, row in zip(p.ranks, p.shards, strict=True):
            held[rank] += sum(row)
    return held


def step_seconds(passes: Sequence[Pass], costs: Costs) -> float:
    """Returns seconds of a step: until its last gradient is summed, plus the fixed cost of a step."""
    return costs.traffic.step_seconds(passes, starts(passes, costs.ranks)[1]) + costs.seconds_per_step


def timed_step(
    passes: Sequence[Pass], batch: tuple[int, ...], costs: Costs, bound_seconds: float, began: float
) -> Step:
    """Returns these passes as a Step. began: time.perf_counter() when solving started."""
    seconds = step_seconds(passes, costs)
    return Step(
        passes=tuple(with_bytes(p, batch, costs) for p in in_order(passes, costs.ranks)),
        seconds=seconds,
        bound_seconds=bound_seconds,
        gap=seconds / bound_seconds - 1 if bound_seconds else 0.0,
        solve_seconds=time.perf_counter() - began,
        batch=batch,
    )


def with_bytes(p: Pass, batch: Sequence[int], costs: Costs) -> Pass:
    """Returns the pass with the bytes that its ranks send, where the model's attention is known."""
    if costs.attention is None:
        return p
    lengths, speeds = [batch[k] for k in p.sequences], [costs.speeds[r] for r in p.ranks]
    return replace(p, sent_bytes=pass_bytes(p.method, lengths, p.shards, speeds, costs.attention))


def in_order(passes: Iterable[Pass], ranks: int) -> tuple[Pass, ...]:
    """Returns the same passes by start time: no rank's own order changes, so no start does."""
    listed = list(passes)
    begun, _ = starts(listed, ranks)
    return tuple(listed[i] for i in sorted(range(len(listed)), key=lambda i: begun[i]))
