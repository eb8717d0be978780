"""Where rank 0 gets its plans from: a process of its own, or a plan file for as long as that has steps."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Plan, Step
from heteromesh.planner.report.check import check_feasible
from heteromesh.planner.sequences.service import Request


@dataclass(frozen=True, slots=True)
class Question:
    """What a plan is for."""

    number: int
    """Of the step, from 1."""
    lengths: tuple[int, ...]
    """Of the sequences that are to be planned, in tokens."""
    members: tuple[int, ...]
    """Who is in the job, by rank."""
    whole: bool = True
    """Whether these are all sequences of the step and all ranks are there: then a plan file's plan holds."""


class PlanService:
    """Plans with a process of its own, which starts when it is first needed; `prepare` makes it plan ahead.

    One thread asks at a time. `close` ends the process.
    """

    def __init__(self, time_limit: float, given: Plan | None = None) -> None:
        """`time_limit`: seconds of computing that the planner may take for a step. `given`: the plan file."""
        self._limit, self._given = time_limit, given
        self._costs: Costs | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-plan")
        self._ahead: tuple[Question, Future[Step]] | None = None

    def start(self) -> None:
        """Starts the process, so that it is ready when it is first asked."""
        if self._process is None:
            self._process = subprocess.Popen(
                # -P: no module of the current folder
                [sys.executable, "-P", "-m", "heteromesh.planner.sequences.service"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def prepare(self, question: Question, costs: Costs, correction: Correction) -> None:
        """Plans in the background what is likely to be asked next."""
        self._ahead = question, self._thread.submit(self._answer, question, costs, correction)

    def plan(self, question: Question, costs: Costs, correction: Correction) -> Step:
        """Returns the step under the corrected costs. Raises UserError where there can be none."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == question:
            return ahead[1].result()
        return self._thread.submit(self._answer, question, costs, correction).result()

    def close(self) -> None:
        """Ends the process and the thread."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
        self._thread.shutdown()
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _answer(self, question: Question, costs: Costs, correction: Correction) -> Step:
        if self._given is not None and question.whole and question.number <= len(self._given.steps):
            return self._from_file(self._given.steps[question.number - 1], question, costs)
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        same, self._costs = costs is self._costs, costs
        request = Request(question.lengths, correction, self._limit, None if same else costs)
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            reply = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise RuntimeError(f"the planning process ended with code {code} at step {question.number}") from None
        if isinstance(reply, UserError):
            raise reply
        assert isinstance(reply, Step)
        return reply

    def _from_file(self, step: Step, question: Question, costs: Costs) -> Step:
        lengths = question.lengths
        if step.batch != lengths:
            raise UserError(
                f"step {question.number - 1} of the plan file is for {len(step.batch)} sequences of {sum(step.batch)} "
                f"tokens and the data has {len(lengths)} of {sum(lengths)}: make the plan for this data, batch size "
                "and seed (`heteromesh run --dry-run`), or use --plan auto"
            )
        check_feasible(step, costs)
        return step
