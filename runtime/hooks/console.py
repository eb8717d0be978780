"""What a run prints: the first plans, a line a step, who was lost and who joined."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from heteromesh.planner.report.text import first_passes
from heteromesh.runtime.hooks.api import Hook, StepCommitted, TrainingReport
from heteromesh.runtime.records.metrics import HEADER, ProgressBar


class Console(Hook):
    """Prints on the rank that writes."""

    def __init__(self, max_steps: int, print_plans: int, run_dir: str) -> None:
        """`print_plans`: how many of the first steps' plans are printed."""
        self._max_steps, self._print_plans, self._run_dir = max_steps, print_plans, run_dir
        self._progress = ProgressBar(max_steps)
        self._began, self._steps, self._writes = time.perf_counter(), 0, True
        self.held: Callable[[], str] = str
        """Returns a line of what ranks hold, to be told after the first step; "" for none."""

    def begin(self) -> None:
        """Prints the header, on the rank that writes; steps' time counts from here."""
        self._began = time.perf_counter()
        self.say(HEADER)

    def say(self, text: str) -> None:
        """Prints whole lines."""
        self._progress.clear()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def step_committed(self, step: StepCommitted) -> None:
        metrics, world = step.metrics, step.world
        self._steps, self._writes = self._steps + 1, world.writes
        if not world.writes:
            return
        if self._steps == 1 and (held := self.held()):
            self.say(held)
        for line in _changes(step):
            self.say(f"step {metrics.step}: {line}")
        if metrics.step <= self._print_plans and step.rounds:
            self.say(first_passes(step.rounds[0].plan, world.size, f"Step {metrics.step}"))
        pace = (time.perf_counter() - self._began) / self._steps
        eta = pace * (self._max_steps - metrics.step)
        self.say(metrics.line(eta))
        self._progress.show(metrics.step, eta)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        if self._writes and values:
            self.say(f"evaluation after step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def end(self, report: TrainingReport) -> None:
        if not self._writes:
            return
        self._progress.clear()
        if report.signal is not None:
            self.say(
                f"stopped by signal {report.signal} after step {report.last_step}; the state is saved in "
                f"{self._run_dir}: resume continues it"
            )


def _changes(step: StepCommitted) -> list[str]:
    """Returns what happened to the membership since the step before, for people."""
    world = step.world
    names = dict(zip(world.members, world.names, strict=True))
    lines = []
    lost = [name for member, name in step.before.items() if member not in names]
    joined = [name for member, name in names.items() if member not in step.before]
    if lost:
        again = sum(len(r.places) for r in step.rounds[1:])
        lines.append(f"lost {', '.join(lost)}; {again} sequences were worked through again")
    if joined:
        lines.append(f"joined by {', '.join(joined)}")
    if lines:
        lines.append("1 member goes on" if world.size == 1 else f"{world.size} members go on")
    return lines
