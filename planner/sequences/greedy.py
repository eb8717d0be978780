"""The joint greedy over pass lists: build for a target time, lower the target, try other choices."""

from __future__ import annotations

import time
from itertools import product, zip_longest

from heteromesh.planner.sequences.pack import pack_anyway, pack_phase
from heteromesh.planner.sequences.partial import PartialStep, StepProblem
from heteromesh.planner.sequences.split import GreedyChoice, Splitter

SMALL = 4096
"""Sequences times ranks up to which a build is so cheap that sequences without a index are tried again as split."""
RETRIES = 5
BUILDS = range(6, 81)
"""Builds after the first good one: as many as EFFORT allows, within this range."""
EFFORT = 500_000
"""Sequences times ranks, summed over builds."""
CUT, LEAST_CUT, LESS = 0.3, 0.002, 0.7
"""A build aims this share of the way from the best step so far to the bound, at least LEAST_CUT below that step; the
share shrinks by LESS where a build misses."""
GOAL = 1.001
"""Within this of the bound nothing is tried any more."""
STEPS = (1.025, 1.06, 1.12, 1.25, 1.6, 2.5)
"""First targets, times the bound, until one is met."""


def greedy(problem: StepProblem, bound: float, deadline: float) -> PartialStep:
    """Returns the best partial step found by `deadline` (time.thread_time); `bound`: seconds that passes take at least.

    Deterministic unless the deadline ends it.
    """
    best = _first(problem, bound)
    builds = EFFORT // (len(problem.lengths) * problem.costs.ranks)
    choices = _choices(problem)
    turn, share = 0, CUT
    for _ in range(min(max(builds, BUILDS[0]), BUILDS[-1])):
        if best.seconds <= bound * GOAL or turn == len(choices) or time.thread_time() > deadline:
            break
        cut = max(LEAST_CUT, share * (1 - bound / best.seconds))
        partial = build(problem, max(best.seconds * (1 - cut), bound), choices[turn])
        if partial.seconds < best.seconds * (1 - 1e-9):
            best = partial
        else:
            turn, share = turn + 1, share * LESS
    return best


def _first(problem: StepProblem, bound: float) -> PartialStep:
    """Builds until a step meets its target."""
    best = build(problem, bound * STEPS[0], GreedyChoice(degrees=4))
    for step in STEPS[1:]:
        if best.seconds <= bound * step:
            break
        best = min(best, build(problem, bound * step, GreedyChoice(degrees=4)), key=lambda d: d.seconds)
    return best


def build(problem: StepProblem, target: float, choice: GreedyChoice) -> PartialStep:
    """Returns a complete partial step that aims at `target` seconds; what finds no index by then ends later.

    Sequences that fit one rank are split only as far as that helps: 0, 1, 2, 4, ... further passes.
    """
    splitter = Splitter(problem, target, choice)
    splitter.must()
    best, more = None, 0
    for _ in range(RETRIES if _small(problem) else 1):
        partial = splitter.partial.copy()
        missing = pack_phase(problem, partial, splitter.left, target)
        pack_anyway(problem, partial, missing)
        if best is None or partial.seconds < best.seconds:
            best = partial
        if not missing or not all(splitter.more() for _ in range(max(1, more))):
            break
        more = max(1, 2 * more)
    assert best is not None
    return best


def _choices(problem: StepProblem) -> list[GreedyChoice]:
    """Returns what to try, most promising first."""
    costs = problem.costs
    if costs.ranks == 1:
        return [GreedyChoice()]
    # Memory that is not proportional to speed may be filled or not.
    full = (False, True) if len({n / v for n, v in zip(costs.capacity, costs.speeds, strict=True)}) > 1 else (False,)
    plain = [
        GreedyChoice(degrees=4, price=price, late=late, full=filled)
        for price, late, filled in product((1.0, 0.5, 2.0, 0.8, 1.25, 0.65, 1.6), (True, False), full)
    ]
    # Where only some ranks can take a sequence it may be better split; where few ranks share few sequences, all may be.
    wide = [
        GreedyChoice(least=least, local_share=share, idle=idle, full=filled)
        for share in ((1.1, 0.0) if problem.rank_sets.uniform else (1.1, 0.9, 0.0))
        for least in sorted({2, (costs.ranks + 1) // 2, costs.ranks})
        for idle, filled in product((1.0, 0.3), full)
    ]
    if not _small(problem):
        return plain
    return [c for pair in zip_longest(plain, wide) for c in pair if c is not None]


def _small(problem: StepProblem) -> bool:
    return len(problem.lengths) * problem.costs.ranks <= SMALL
