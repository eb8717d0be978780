"""The training loop: whatever is due is attempted, committed and applied, until nothing is left. One for all modes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from heteromesh.comm.session import Attempt, Session
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.runtime.hooks.api import Hook, StepCommitted, Stop, TrainingReport
from heteromesh.runtime.process.interrupt import Interrupt
from heteromesh.runtime.training.progress import TrainingProgress
from heteromesh.runtime.training.transactions import Transaction
from heteromesh.runtime.work.source import PlanningFailed

Outcome = tuple[Transaction, Any]


class TrainingLoop:
    """Runs transactions in the order of their list: of those that are due the first, again and again.

    In a session whose ranks come and go all of them agree on what is due, since that follows from what was committed.
    """

    def __init__(
        self, session: Session, progress: TrainingProgress, interrupt: Interrupt, hooks: Sequence[Hook], run_dir: str
    ) -> None:
        """`hooks`: ours, then the user's. The transactions are added when they are made, as they call back."""
        self.session, self.progress, self.hooks = session, progress, list(hooks)
        self.transactions: list[Transaction] = []
        self._interrupt, self._run_dir = interrupt, run_dir
        self._failure = ""
        self._losses: list[float] = []
        self._waited = 0.0
        self._world: World | None = None

    def run(self, start: Callable[[], None]) -> TrainingReport:
        """Trains until all is done and saved; returns what happened. `start` is called when the job takes up work.

        Raises UserError where a step can't be planned or a hook failed, when all that was trained has been saved.
        """
        self._world = self.session.start()
        start()
        began, refused, first = time.perf_counter(), None, self.progress.done + 1
        while not self.progress.over:
            try:
                self._next()
            except PlanningFailed as error:
                # every rank is told so in the same attempt
                refused, self.progress.stop = error.reason, Stop(failure="planning")
        elapsed = time.perf_counter() - began
        if refused is not None:
            raise refused
        stop = self.progress.stop
        if stop is not None and stop.failure:
            raise UserError(f"{stop.failure}; the run is saved after step {self.progress.done} in {self._run_dir}")
        return TrainingReport(
            first_step=first,
            last_step=self.progress.done,
            losses=tuple(self._losses),
            plan_wait_share=self._waited / elapsed if self._losses else 0.0,
            signal=stop.signal if stop is not None else None,
        )

    def end(self, report: TrainingReport) -> None:
        """Calls the hooks' last method."""
        for hook in self.hooks:
            hook.end(report)

    def asked(self) -> Stop | None:
        """Returns why this rank wants to stop, if it does."""
        if self._failure:
            return Stop(failure=self._failure)
        return Stop(signal=self._interrupt.signal) if self._interrupt.signal else None

    def step_committed(self, step: StepCommitted) -> None:
        """Tells the hooks."""
        self._losses.append(step.metrics.loss)
        self._waited += step.metrics.plan_wait_seconds
        for hook in self.hooks:
            try:
                hook.step_committed(step)
            except UserError:
                raise
            except Exception as error:
                self.failed(hook, "step_committed", error)

    def failed(self, hook: Hook, method: str, error: Exception) -> None:
        """Takes note that a hook raised: all ranks stop at the end of the next step, and save."""
        self._failure = self._failure or (
            f"hook {hook.name}.{method} raised {type(error).__name__}: {error} at step {self.progress.done} "
            "(mend the hook, then resume)"
        )
        if self._world is not None and self._world.size == 1:
            self.progress.stop = Stop(failure=self._failure)

    def _next(self) -> None:
        done = self.session.commit(self._attempt, overlap=self._overlap)
        self._world = done.world
        transaction, result = done.result
        transaction.committed(replace(done, result=result))

    def _attempt(self, world: World) -> Attempt[Outcome]:
        transaction = next(t for t in self.transactions if t.due(world))
        made = transaction.attempt(world)
        return Attempt((transaction, made.result), f"{type(transaction).__name__} {made.digest}")

    @staticmethod
    def _overlap(outcome: Outcome) -> None:
        transaction, result = outcome
        transaction.overlap(result)
