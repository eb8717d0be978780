"""The joint greedy over pass lists: build for a target time, lower the target, try other choices."""

from __future__ import annotations

import time
from itertools import product, zip_longest

from heteromesh.planner.draft import Draft, Task
from heteromesh.planner.pack import pack_anyway, pack_phase
from heteromesh.planner.split import Choice, Splitter

SMALL = 4096
"""Sequences times ranks up to which a build is so cheap that sequences without a place are tried again as split."""
RETRIES = 5
BUILDS = range(6, 61)
"""Builds after the first good one: as many as EFFORT allows, within this range."""
EFFORT = 500_000
"""Sequences times ranks, summed over builds."""
CUT = 0.003
"""By how much a build tries to beat the best step so far."""
GOAL = 1.001
"""Within this of the bound nothing is tried any more."""
STEPS = (1.01, 1.03, 1.06, 1.1, 1.16, 1.25, 1.4, 1.6, 2.0, 3.0)
"""First targets, times the bound, until one is met."""


def greedy(task: Task, bound: float, deadline: float) -> Draft:
    """The best draft found by `deadline` (time.perf_counter); `bound`: seconds that passes take at least.

    Deterministic unless the deadline ends it.
    """
    best = _first(task, bound)
    choices = _choices(task)
    turn = 0
    builds = EFFORT // (len(task.lengths) * task.costs.ranks)
    for _ in range(min(max(builds, BUILDS[0]), BUILDS[-1])):
        if best.seconds <= bound * GOAL or turn == len(choices) or time.perf_counter() > deadline:
            break
        target = max(best.seconds * (1 - CUT), bound)
        draft = build(task, target, choices[turn])
        if draft.seconds < best.seconds * (1 - 1e-9):
            best = draft
        else:
            turn += 1
    return best


def _first(task: Task, bound: float) -> Draft:
    """The first draft that meets its target."""
    best = None
    for step in STEPS:
        draft = build(task, bound * step, Choice())
        if best is None or draft.seconds < best.seconds:
            best = draft
        if best.seconds <= bound * step * (1 + 1e-9):
            break
    assert best is not None
    return best


def build(task: Task, target: float, choice: Choice) -> Draft:
    """A complete draft that aims at `target` seconds; what finds no place by then ends later.

    Sequences that fit one rank are split only as far as that helps: 0, 1, 2, 4, ... further passes.
    """
    splitter = Splitter(task, target, choice)
    splitter.must()
    best, more = None, 0
    for _ in range(RETRIES if _small(task) else 1):
        draft = splitter.draft.copy()
        missing = pack_phase(task, draft, splitter.left, target)
        pack_anyway(task, draft, missing)
        if best is None or draft.seconds < best.seconds:
            best = draft
        if not missing or not all([splitter.more() for _ in range(max(1, more))]):
            break
        more = max(1, 2 * more)
    assert best is not None
    return best


def _choices(task: Task) -> list[Choice]:
    """What to try, most promising first."""
    ranks = task.costs.ranks
    plain = [
        Choice(degrees=4, price=price, late=late) for price, late in product((1.0, 0.5, 2.0, 0.8, 1.25), (True, False))
    ]
    if ranks == 1:
        return plain[:1]
    # Where only some ranks can take a sequence it may be better split; where few ranks share few sequences, all may be.
    shares = (1.1,) if task.fleet.uniform else (1.1, 0.9)
    wide = [
        Choice(least=least, local_share=share, idle=idle)
        for share in (*shares, 0.0)
        for least in sorted({2, (ranks + 1) // 2, ranks})
        for idle in (1.0, 0.3)
    ]
    if not _small(task):
        return plain + wide
    return [c for pair in zip_longest(plain, wide) for c in pair if c is not None]


def _small(task: Task) -> bool:
    return len(task.lengths) * task.costs.ranks <= SMALL
