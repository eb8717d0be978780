"""Where rank 0 gets its plans from: a process of its own, or a plan file for as long as that has steps."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Plan, Step
from heteromesh.planner.report.check import check_feasible
from heteromesh.planner.sequences.service import Request


class PlanService:
    """A planning process. Use as a context manager: leaving it ends the process."""

    def __init__(self, time_limit: float, given: Plan | None = None) -> None:
        self._limit, self._given = time_limit, given
        self._costs: Costs | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PlanService:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "heteromesh.planner.sequences.service"],  # -P: no module of the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self

    def use(self, costs: Costs) -> None:
        """Sets the cost model; once, before the first plan. The process has started up meanwhile."""
        self._costs = costs
        self._send(costs)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stdout is None:
            return
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()

    def plan(self, index: int, lengths: Sequence[int], correction: Correction) -> Step:
        """The plan of step `index` over sequences of these lengths under the corrected costs.

        Raises UserError where there can be none.
        """
        if self._given is not None and index < len(self._given.steps):
            return self._from_file(self._given.steps[index], index, lengths)
        self._send(Request(tuple(lengths), correction, self._limit))
        assert self._process
        assert self._process.stdout
        try:
            reply = pickle.load(self._process.stdout)
        except EOFError:
            raise RuntimeError(f"the planning process ended with code {self._process.wait()} at step {index}") from None
        if isinstance(reply, UserError):
            raise reply
        assert isinstance(reply, Step)
        return reply

    def _from_file(self, step: Step, index: int, lengths: Sequence[int]) -> Step:
        if step.batch != tuple(lengths):
            raise UserError(
                f"step {index} of the plan file is for {len(step.batch)} sequences of {sum(step.batch)} tokens and the "
                f"data has {len(lengths)} of {sum(lengths)}: make the plan for this data, batch size and seed "
                "(`heteromesh run --dry-run`), or use --plan auto"
            )
        assert self._costs
        check_feasible(step, self._costs)
        return step

    def _send(self, message: Costs | Request) -> None:
        assert self._process
        assert self._process.stdin
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()
