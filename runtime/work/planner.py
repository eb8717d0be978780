"""Plans for a membership that may change at any moment: ahead in a thread, or at once when it did."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Step
from heteromesh.planner.sequences.step import plan_step


class Question(NamedTuple):
    """What a plan is for."""

    lengths: tuple[int, ...]
    members: tuple[int, ...]


class ElasticPlanner:
    """Rank 0's planner."""

    def __init__(self, time_limit: float) -> None:
        self._limit = time_limit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-plan")
        self._ahead: tuple[Question, Future[Step]] | None = None

    def prepare(self, question: Question, costs: Costs) -> None:
        """Starts to plan what is likely to be asked next."""
        self._ahead = question, self._thread.submit(plan_step, question.lengths, costs, time_limit=self._limit)

    def plan(self, question: Question, costs: Costs) -> Step:
        """The step. Raises UserError where there is none."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == question:
            return ahead[1].result()
        return plan_step(question.lengths, costs, time_limit=self._limit)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()
