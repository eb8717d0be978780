"""What the training loop asks of a work source: what this rank is to do next, planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Step
from heteromesh.runtime.work.reader import PassInput
from heteromesh.runtime.work.sampler import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One step's work, or what is missing of it."""

    number: int
    """Of the step, from 1."""
    batch: Batch
    places: tuple[int, ...]
    """Of the plan's sequences in the batch."""
    step: Step | None
    """The plan; None where nothing is missing."""
    inputs: Mapping[int, PassInput] = field(default_factory=dict)
    """By position in the plan, this rank's tensors."""
    divisor: float
    """What losses are divided by before the backward: the valid tokens of the whole batch where they are known, over
    the loss scale where there is one."""
    speeds: tuple[float, ...] = ()
    """By rank, as the planner had them."""
    correction: Correction = field(default_factory=Correction)
    """Of the costs, with which it was planned."""
    plan_wait_seconds: float = 0.0
    data_wait_seconds: float = 0.0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Returns the lengths of the plan's sequences, in tokens."""
        return tuple(self.batch.lengths[i] for i in self.places)


class PlanningFailed(Exception):
    """A step can't be planned; every rank is told so at the same step."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class CostModel(Protocol):
    """What a work source asks of whoever keeps the costs."""

    def correction(self, members: tuple[int, ...]) -> Correction:
        """Returns what steps have shown of these members' costs so far."""

    def of(self, members: tuple[int, ...]) -> Costs:
        """Returns the costs, not corrected, of a job of these members, in rank order."""

    def complete(self, members: tuple[int, ...]) -> bool:
        """Whether these are all ranks of the job's cluster, in its order."""


class WorkSource(Protocol):
    """Batches in the sampler's order, each planned for whoever is in the job."""

    def plan(self, number: int, world: World, done: frozenset[int]) -> Assignment:
        """Returns what is missing of step `number` (from 1) when the batch's sequences `done` are held by somebody.

        Every rank of the world calls it; repeatable until `committed`. Raises PlanningFailed, on every rank, where
        there can be no plan.
        """

    def committed(self, world: World, number: int, last: bool) -> None:
        """Notes that step `number` is applied: the next `plan`, unless it was the `last`, is for the batch after."""

    def restart(self) -> None:
        """Forgets the batch at hand: the sampler was set to another place."""

    def close(self) -> None:
        """Ends threads and processes."""
