"""Plans one step: which ranks work through which sequences, in which order."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress

from heteromesh.errors import UserError
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.batch import largest, validate_lengths
from heteromesh.planner.sequences.bound import passes_bound, with_step
from heteromesh.planner.sequences.greedy import greedy
from heteromesh.planner.sequences.held import check_held, held_passes, holds, leaning, priced_anew
from heteromesh.planner.sequences.ilp import refine
from heteromesh.planner.sequences.partial import PartialStep, StepProblem
from heteromesh.planner.sequences.static import best_even_passes
from heteromesh.planner.sequences.timeline import step_seconds, timed_step

__all__ = ["plan_step", "step_seconds"]

GREEDY_SHARE = 0.5
"""Of the time limit; what the greedy doesn't need is left for the integer program."""
PROGRAM_SECONDS = 0.5
"""Less time than this is not worth starting the integer program."""
PROGRAM_GAP = 0.01


def plan_step(lengths: Sequence[int], costs: Costs, *, time_limit: float = 0.2) -> Step:
    """Returns a step over sequences of these lengths (tokens) that is short under `costs`.

    Greedy first; where it stays more than 1 % above the bound, the step is small and at least half a second of
    `time_limit` is left, an integer program tries to beat it. Where devices have memory of their own, a second search
    looks for a shorter step whose passes may keep activations in host memory. Equal input gives an equal step unless
    the time limit cuts a search short: it is in seconds of the calling thread's processor time, so that a busy machine
    makes no plan worse. Raises UserError for an empty batch, for a length that is no whole number above 0, for a
    sequence that fits no set of ranks, and for a batch that ranks can't hold in one step (`Costs.step_capacity`).
    """
    began, deadline = time.perf_counter(), time.thread_time() + time_limit
    wide = costs.offloading()
    batch = validate_lengths(lengths, wide or costs)
    check_held(batch, costs)
    found: list[Sequence[Pass]] = []
    bound = math.inf
    if wide is None or max(batch) <= largest(costs)[0]:
        bound = passes_bound(batch, costs)
        found += _planned(batch, costs, bound, time_limit)
    if wide is not None:
        bound = min(bound, passes_bound(batch, wide))
        found += _planned(batch, wide, bound, deadline - time.thread_time())
    if not all(holds(passes, costs) for passes in found):
        found = _held(found, batch, costs, bound, deadline - time.thread_time())
    best = min(found, key=lambda passes: step_seconds(passes, costs))
    return timed_step(best, batch, costs, with_step(bound, costs), began)


def _held(
    found: Sequence[Sequence[Pass]], batch: tuple[int, ...], costs: Costs, least: float, time_limit: float
) -> list[Sequence[Pass]]:
    """Returns those of the pass lists, and of further ones, that give no rank more than it can hold in a step."""
    others = _planned(batch, leaning(costs, sum(batch)), least, time_limit)
    every = [*found, *(priced_anew(passes, batch, costs) for passes in others)]
    fitting = [passes for passes in every if holds(passes, costs)]
    with suppress(UserError) if fitting else nullcontext():
        fitting.append(held_passes(batch, costs))
    return fitting


def _planned(batch: tuple[int, ...], costs: Costs, least: float, time_limit: float) -> list[Sequence[Pass]]:
    """Returns the best step found, and the best static even layout where there is one: a plan is never behind it.

    least: no passes end before.
    """
    began = time.thread_time()
    problem = StepProblem(batch, costs)
    partial = greedy(problem, least, began + GREEDY_SHARE * time_limit)
    left = time_limit - (time.thread_time() - began)
    if left > PROGRAM_SECONDS and partial.seconds > least * (1 + PROGRAM_GAP):
        partial = _shorter(partial, refine(problem, partial.seconds, least, left), problem)
    found: list[Sequence[Pass]] = [partial.passes(problem)]
    with suppress(UserError):
        found.append(best_even_passes(problem.batch, problem.costs))
    return found


def _shorter(partial: PartialStep, other: PartialStep | None, problem: StepProblem) -> PartialStep:
    """Returns the partial step with fewer exact seconds: whole tokens may turn a tiny lead around."""
    if other is None:
        return partial
    return min(partial, other, key=lambda d: step_seconds(d.passes(problem), problem.costs))
