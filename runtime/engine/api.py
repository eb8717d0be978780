"""What the training loop asks of an engine: to run what is planned, and to say what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from heteromesh.comm.gradients.exchange import GradientExchange
from heteromesh.comm.world import World
from heteromesh.runtime.work.source import Assignment


class PassMeasure(NamedTuple):
    """What a pass took on one rank."""

    position: int
    """In the plan's list of passes."""
    rank: int
    seconds: float
    waited_seconds: float
    """Of these, for exchanges with the pass's other ranks."""
    sent_bytes: int


class NonFinite(NamedTuple):
    """A sequence whose loss is not a number or infinite."""

    rank: int
    sequence: int
    """Its place in the step's batch."""
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What an engine's run took on this rank."""

    passes: tuple[PassMeasure, ...] = ()
    busy_seconds: float = 0.0
    """In passes, without waiting for other ranks."""
    non_finite: tuple[NonFinite, ...] = ()

    def plus(self, later: Measurements) -> Measurements:
        """Returns both together; passes of a repair are not those of the plan, so only the first run's are kept."""
        return Measurements(
            passes=self.passes or later.passes,
            busy_seconds=self.busy_seconds + later.busy_seconds,
            non_finite=self.non_finite + later.non_finite,
        )


class Engine(Protocol):
    """Executes this rank's share of a step."""

    def run(self, assignment: Assignment, world: World, exchange: GradientExchange) -> Measurements:
        """Runs forward and backward of this rank's part into shares of `exchange`.

        Raises GroupAborted where the epoch ends under it.
        """

    def close(self) -> None:
        """Takes its hooks off the model."""
