"""The training loop: whatever is due is attempted, committed and applied, until nothing is left. One for all modes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from heteromesh.comm.session import Attempt, Session
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.runtime.hooks.api import StepCommitted, Stop, TrainingReport
from heteromesh.runtime.hooks.calls import HookCalls
from heteromesh.runtime.process.interrupt import Interrupt
from heteromesh.runtime.training.progress import TrainingProgress
from heteromesh.runtime.training.transactions import Refusal, Transaction
from heteromesh.runtime.work.source import PlanningFailed

Outcome = tuple[Transaction, Any]


class TrainingLoop:
    """Runs transactions in the order of their list: of those that are due the first, again and again.

    In a session whose ranks come and go all of them agree on what is due, since that follows from what was committed.
    """

    def __init__(
        self, session: Session, progress: TrainingProgress, interrupt: Interrupt, hooks: HookCalls, run_dir: str
    ) -> None:
        """The transactions are added when they are made, as they call back."""
        self.session, self.progress, self.hooks = session, progress, hooks
        self.transactions: list[Transaction] = []
        self._interrupt, self._run_dir = interrupt, run_dir
        self._refusal = Refusal(progress)
        self._losses: list[float] = []
        self._waited = 0.0
        self._first, self._began = progress.done + 1, time.perf_counter()

    def run(self, start: Callable[[], None]) -> TrainingReport:
        """Trains until all is done and saved; returns what happened. `start` is called when the job takes up work.

        Raises UserError where a step can't be planned or a hook failed, when all that was trained has been saved.
        """
        self.session.start()
        start()
        self._first, self._began = self.progress.done + 1, time.perf_counter()
        while not self.progress.over:
            self._next()
        if self._refusal.reason is not None:
            raise self._refusal.reason
        stop = self.progress.stop
        if stop is not None and stop.failure:
            raise UserError(f"{stop.failure}; the run is saved after step {self.progress.done} in {self._run_dir}")
        return self.report()

    def report(self) -> TrainingReport:
        """Returns what has happened so far."""
        elapsed, stop = time.perf_counter() - self._began, self.progress.stop
        return TrainingReport(
            first_step=self._first,
            last_step=self.progress.done,
            losses=tuple(self._losses),
            plan_wait_share=self._waited / elapsed if self._losses else 0.0,
            signal=stop.signal if stop is not None else None,
        )

    def asked(self) -> Stop | None:
        """Returns why this rank wants to stop, if it does."""
        return self.hooks.stop or (Stop(signal=self._interrupt.signal) if self._interrupt.signal else None)

    def step_committed(self, step: StepCommitted) -> None:
        """Tells the hooks."""
        self._losses.append(step.metrics.loss)
        self._waited += step.metrics.plan_wait_seconds
        self.hooks.step_committed(step)

    def _next(self) -> None:
        done = self.session.commit(self._attempt, overlap=self._overlap)
        transaction, result = done.result
        transaction.committed(replace(done, result=result))

    def _attempt(self, world: World) -> Attempt[Outcome]:
        transaction = next(t for t in self.transactions if t.due(world))
        try:
            made = transaction.attempt(world)
        except PlanningFailed as error:
            # every rank is told so in the same attempt; it counts when all have been
            return Attempt((self._refusal, error.reason), f"refused: {error}")
        return Attempt((transaction, made.result), f"{type(transaction).__name__} {made.digest}")

    @staticmethod
    def _overlap(outcome: Outcome) -> None:
        transaction, result = outcome
        transaction.overlap(result)
