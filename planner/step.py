"""Plans one step: which ranks work through which sequences, in which order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from heteromesh.planner.batch import checked
from heteromesh.planner.bound import bound_seconds
from heteromesh.planner.cost import Costs
from heteromesh.planner.draft import Draft, Task
from heteromesh.planner.errors import UserError
from heteromesh.planner.greedy import greedy
from heteromesh.planner.ilp import refine
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.static import best_even_passes
from heteromesh.planner.timeline import step_seconds, timed_step

__all__ = ["plan_step", "step_seconds"]

GREEDY_SHARE = 0.5
"""Of the time limit; what the greedy doesn't need is left for the integer program."""
PROGRAM_SECONDS = 0.5
"""Less time than this is not worth starting the integer program."""
PROGRAM_GAP = 0.01


def plan_step(lengths: Sequence[int], costs: Costs, *, time_limit: float = 0.2) -> Step:
    """A step over sequences of these lengths (tokens) that is short under `costs`.

    Greedy first; where it stays more than 1 % above the bound, the step is small and at least half a second of
    `time_limit` (seconds) is left, an integer program tries to beat it. Equal input gives an equal step unless the
    time limit cuts a search short. Raises UserError for an empty batch, for a length that is no whole number above 0
    and for a sequence that fits no set of ranks.
    """
    began = time.perf_counter()
    batch = checked(lengths, costs)
    task, bound = Task(batch, costs), bound_seconds(batch, costs)
    least = bound - costs.seconds_per_step
    draft = greedy(task, least, began + GREEDY_SHARE * time_limit)
    left = time_limit - (time.perf_counter() - began)
    if left > PROGRAM_SECONDS and draft.seconds > least * (1 + PROGRAM_GAP):
        draft = _shorter(draft, refine(task, draft.seconds, least, left), task)
    passes = min(_candidates(draft, task), key=lambda candidate: step_seconds(candidate, costs))
    return timed_step(passes, batch, costs, bound, began)


def _candidates(draft: Draft, task: Task) -> list[Sequence[Pass]]:
    """The draft, and the best static even layout where one is possible: a plan is never behind it."""
    found: list[Sequence[Pass]] = [draft.passes(task)]
    with suppress(UserError):
        found.append(best_even_passes(task.batch, task.costs))
    return found


def _shorter(draft: Draft, other: Draft | None, task: Task) -> Draft:
    """The draft with fewer exact seconds: whole tokens may turn a tiny lead around."""
    if other is None:
        return draft
    return min(draft, other, key=lambda d: step_seconds(d.passes(task), task.costs))
