"""Whether a slow member is worth keeping: what the job loses by its slowness, against what its eviction costs."""

from __future__ import annotations

from dataclasses import dataclass

from heteromesh.faults.diagnosis.diagnosis import Diagnosis

EVICTION_SECONDS = 10.0
"""What an eviction takes once, besides a step done again: the process starts again, joins and gets the state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """The job, as far as the choice depends on it."""

    members: int
    min_members: int
    """Fewer members end the job."""
    step_seconds: float
    """As slow as it is now."""
    steps_left: int
    """Where that is not known: as many as since the trouble began (ski rental: at most twice what is best costs)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Eviction:
    """What it is worth to go on without the member."""

    saves: float
    """Seconds of the remaining steps, its own cost taken off."""
    each: float
    """Seconds of each step."""


def price_eviction(found: Diagnosis, situation: Situation) -> Eviction | None:
    """Returns what the eviction of the member is worth; None where the job needs it, or where no one member is slow."""
    step, others = situation.step_seconds, situation.members - 1
    if found.place == "link" or others < max(situation.min_members, 1):
        return None
    lost = min(found.lost, 0.99) * step
    # the others do its share of the work
    each = lost - (step - lost) / others
    return Eviction(saves=each * situation.steps_left - EVICTION_SECONDS - step, each=each)
