"""The last steps, for comparisons at the end of a run."""

from __future__ import annotations

from collections import deque

from heteromesh.planner.plan import Step
from heteromesh.runtime.hooks.api import Hook, StepCommitted
from heteromesh.runtime.work.sampler import Batch


class RecentSteps(Hook):
    """Keeps so many of the last batches and their plans."""

    def __init__(self, count: int) -> None:
        self._steps: deque[tuple[Batch, Step]] = deque(maxlen=count)

    @property
    def steps(self) -> tuple[tuple[Batch, Step], ...]:
        """From the oldest to the newest."""
        return tuple(self._steps)

    def step_committed(self, step: StepCommitted) -> None:
        self._steps.append((step.batch, step.rounds[0].plan))
