"""The hooks of a training run, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from heteromesh.comm.gradients.exchange import Held
from heteromesh.comm.world import World
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.plan import Step
from heteromesh.runtime.engine.api import Measurements
from heteromesh.runtime.engine.baselines import EvenSplit
from heteromesh.runtime.records.metrics import StepMetrics
from heteromesh.runtime.work.sampler import Batch


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run ends before its last step."""

    signal: int | None = None
    """The signal that a rank was sent."""
    failure: str = ""
    """What went wrong in a hook of a rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """What a rank tells the others in every step."""

    held: Held
    """What its gradients hold."""
    measured: Measurements
    plan_wait_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    parameter_wait_seconds: float = 0.0
    """Of its passes, for parameters from a sharded optimizer's owners."""
    stop: Stop | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A plan, and who was to execute it."""

    members: tuple[int, ...]
    places: tuple[int, ...]
    """Of the plan's sequences in the step's batch."""
    plan: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted:
    """A step that every rank has applied; equal on every rank but for `world.rank`."""

    metrics: StepMetrics
    world: World
    """Who was in the job in that step."""
    before: Mapping[int, str]
    """Names of the members of the step before, by id; before the first step those of this one."""
    batch: Batch
    rounds: tuple[Round, ...]
    """The first has the whole batch, later ones what was lost with a member. Empty on a rank that joined too late."""
    reports: tuple[MemberReport, ...]
    """By rank."""
    correction: Correction
    """Of the costs, with which the step was planned."""
    digest: str
    """Of the summed gradients, where ranks vote on it."""
    attempts: int
    """1, and one more for each loss of a member under the step."""
    work_seconds: float
    """From the start of the attempt that was committed to the end of the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """How a run went; equal on every rank."""

    first_step: int
    """The first step of this run, from 1; more than 1 after a resume."""
    last_step: int
    losses: tuple[float, ...]
    """One a step."""
    plan_wait_share: float
    """Of the steps' time, waited for plans that were late."""
    comparisons: tuple[EvenSplit, ...] = ()
    signal: int | None = None
    """The signal that ended the run early."""

    def with_comparisons(self, comparisons: tuple[EvenSplit, ...]) -> TrainingReport:
        """Returns the same report with these."""
        return replace(self, comparisons=comparisons)

    def summary(self) -> str:
        """Returns a few lines for people."""
        if not self.losses:
            return "no step was left to do"
        lines = [
            f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f} in steps {self.first_step} to {self.last_step}",
            f"waited for late plans: {self.plan_wait_share:.3%} of the time",
            *(comparison.line() for comparison in self.comparisons),
        ]
        return "\n".join(lines)


class Hook:
    """Base of hooks: override what you need. Every rank calls its own.

    One that raises, on any rank and in any method, stops the run: all ranks are told, and the state is saved.
    """

    evaluate_every: int = 0
    """Steps between two calls of `evaluate`; 0: never."""

    @property
    def name(self) -> str:
        """The class, for messages."""
        return type(self).__name__

    def step_committed(self, step: StepCommitted) -> None:
        """Is called after every step, on every rank; parameters may still be on their way (shard_optimizer)."""

    def evaluate(self, step: int, model: nn.Module, world: World) -> Mapping[str, float] | None:
        """Is called on every rank with all parameters up to date; rank 0's named numbers are printed and recorded.

        The model is in evaluation mode and records no gradients. Ranks may share the work and add up in `world`. Is
        called again for the same step when a member is lost meanwhile.
        """

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Is called on every rank with what all hooks' `evaluate` returned on rank 0, by name."""

    def checkpoint_saved(self, step: int, path: Path) -> None:
        """Is called on every rank when a checkpoint has been handed to its writer; the last one is whole."""

    def end(self, report: TrainingReport) -> None:
        """Is called once on every rank, when all is done and saved; not after an error."""
