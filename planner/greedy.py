"""The joint greedy over pass lists: build for a target time, lower the target, try other choices."""

from __future__ import annotations

import time
from itertools import product

from heteromesh.planner.draft import Draft, Task
from heteromesh.planner.pack import pack_anyway, pack_phase
from heteromesh.planner.split import Choice, split_phase

RETRIES = 3
"""Times that sequences which found no place are split instead."""


def greedy(task: Task, bound: float, deadline: float, goal: float = 1.002) -> Draft:
    """The best draft found by `deadline` (time.perf_counter); stops within `goal` of the bound on passes' seconds."""
    first = Choice()
    low, best = bound, build(task, bound * 1.02, first)
    target = bound * 1.02
    while best.seconds > target * (1 + 1e-9) and target < best.seconds:
        low, target = target, min(target * 1.06, best.seconds)
        best = min(best, build(task, target, first), key=lambda d: d.seconds)
    for _ in range(3):
        if time.perf_counter() > deadline:
            return best
        target = (low + best.seconds) / 2
        draft = build(task, target, first)
        if draft.seconds < best.seconds:
            best = draft
        else:
            low = target
    for choice, cut in _variants():
        if best.seconds <= bound * goal or time.perf_counter() > deadline:
            break
        draft = build(task, best.seconds * (1 - cut), choice)
        if draft.seconds < best.seconds:
            best = draft
    return best


def build(task: Task, target: float, choice: Choice) -> Draft:
    """A complete draft that aims at `target` seconds; what finds no place by then ends later."""
    forced: frozenset[int] = frozenset()
    for _ in range(RETRIES):
        draft, rest = split_phase(task, target, choice, forced)
        missing = pack_phase(task, draft, rest, target)
        if not missing or draft.seconds > target * (1 + 1e-9) or task.costs.ranks == 1:
            break
        forced |= set(missing)
    pack_anyway(task, draft, missing)
    return draft


def _variants() -> list[tuple[Choice, float]]:
    return [
        (Choice(degrees=degrees, price=price, late=late), cut)
        for cut, degrees, price, late in product((0.002, 0.006), (10, 4), (1.0, 0.7, 1.4), (False, True))
    ]
