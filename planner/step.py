"""Plans one step: which ranks work through which sequences, in which order."""

from __future__ import annotations

import time
from collections.abc import Sequence

from heteromesh.planner.batch import checked
from heteromesh.planner.bound import bound_seconds
from heteromesh.planner.cost import Costs
from heteromesh.planner.draft import Task
from heteromesh.planner.greedy import greedy
from heteromesh.planner.plan import Step
from heteromesh.planner.timeline import in_order, step_seconds

__all__ = ["plan_step", "step_seconds"]


def plan_step(lengths: Sequence[int], costs: Costs, *, time_limit: float = 0.2) -> Step:
    """A step over sequences of these lengths (tokens) that is short under `costs`."""
    began = time.perf_counter()
    batch = checked(lengths, costs)
    bound = bound_seconds(batch, costs)
    task = Task(batch, costs)
    draft = greedy(task, bound - costs.seconds_per_step, began + 0.6 * time_limit)
    passes = in_order(draft.passes(task), costs.ranks)
    seconds = step_seconds(passes, costs)
    return Step(
        passes=passes,
        seconds=seconds,
        bound_seconds=bound,
        gap=seconds / bound - 1 if bound else 0.0,
        solve_seconds=time.perf_counter() - began,
        batch=batch,
    )
