"""Costs follow what passes take: after every step the cost model is corrected for the plans to come."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from heteromesh.planner.cost.correction import Correction, Learner
from heteromesh.planner.cost.passes import Costs
from heteromesh.runtime.hooks.api import Hook, StepCommitted


class BaseCosts(Protocol):
    """What passes cost before any step has shown it."""

    def of(self, members: tuple[int, ...]) -> Costs:
        """Returns the costs of a job of these members, in rank order."""

    def complete(self, members: tuple[int, ...]) -> bool:
        """Whether these are all ranks of the job's cluster, in its order."""


@dataclass(frozen=True, slots=True)
class FixedCosts:
    """Those of ranks that stay."""

    costs: Costs

    def of(self, members: tuple[int, ...]) -> Costs:
        return self.costs

    def complete(self, members: tuple[int, ...]) -> bool:
        return True


class CostLearning(Hook):
    """The `CostModel` of a job: base costs of any set of members, and how far steps have shown them to be off.

    Every rank learns the same from the same committed reports, so whoever gets rank 0 goes on with it.
    """

    def __init__(
        self,
        base: BaseCosts,
        *,
        learns: bool,
        waits_known: bool,
        seconds_per_step: float = 0.0,
    ) -> None:
        """`learns`: constants that the user gave stand. `waits_known`: whether seconds that a pass waits for others are
        told apart. `seconds_per_step`: what a step takes beyond its passes, before any has shown it."""
        self._base, self._learns = base, learns
        self._learner = Learner(waits_known=waits_known)
        self._overheads: deque[float] = deque(maxlen=9)
        self._known: tuple[tuple[int, ...], Correction] = (), Correction(seconds_per_step=seconds_per_step)
        self._cached: tuple[tuple[int, ...], Costs] | None = None

    def of(self, members: tuple[int, ...]) -> Costs:
        """Returns the costs, not corrected, of a job of these members, in rank order."""
        if self._cached is None or self._cached[0] != members:
            self._cached = members, self._base.of(members)
        return self._cached[1]

    def complete(self, members: tuple[int, ...]) -> bool:
        """Whether these are all ranks of the job's cluster, in its order."""
        return self._base.complete(members)

    def correction(self, members: tuple[int, ...]) -> Correction:
        """Returns what steps have shown of these members' costs so far."""
        known, correction = self._known
        if known and known != members:
            return self._learner.correction(members, correction.seconds_per_step)
        return correction

    def step_committed(self, step: StepCommitted) -> None:
        """Learns from the passes of a step that nothing disturbed."""
        members = step.world.members
        spent = [sum(p.seconds for p in report.measured.passes) for report in step.reports]
        if step.metrics.step > 1:  # the first step has allocations that no other has
            traffic = self.of(members).traffic
            known = traffic.at_least(max(spent)) if traffic.layer_major else max(spent)
            self._overheads.append(max(0.0, step.work_seconds - known))
        if self._learns and len(step.rounds) == 1 and step.rounds[0].members == members:
            passes = [p for report in step.reports for p in report.measured.passes]
            seconds = {(p.rank, p.position): p.seconds for p in passes}
            waits = {(p.rank, p.position): p.waited_seconds for p in passes}
            self._learner.add(members, self.of(members), step.rounds[0].plan, seconds, waits)
        beyond = statistics.median(self._overheads) if self._overheads else self._known[1].seconds_per_step
        self._known = members, self._learner.correction(members, beyond)

    def snapshot(self) -> list[Any]:
        """Returns plain values for a rank that joins."""
        return [self._learner.state(), list(self._overheads)]

    def adopt(self, state: Sequence[Any]) -> None:
        """Continues where another rank's costs were."""
        learned, overheads = state
        self._learner.adopt(learned)
        self._overheads.extend(overheads)
