"""What to do about a slow member or link: the action that costs the job the least time from now on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from heteromesh.faults.diagnosis.diagnosis import Finding

Action = Literal["ignore", "re-balance", "re-route", "evict"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Seconds that an action takes once, besides a step that is done again."""

    rebalance: float = 1.0
    reroute: float = 0.2
    evict: float = 10.0
    """The member's process starts again, joins and gets the state; its share of a step is done by others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """The job, as far as the choice depends on it."""

    members: int
    least: int
    """Fewer members end the job."""
    step_seconds: float
    """As slow as it is now."""
    steps_left: int
    """Where that is not known: as many as since the trouble began (ski rental: at most twice what is best costs)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An action and what it is worth."""

    action: Action
    saves: float
    """Seconds of the remaining steps that it saves, its own cost taken off."""
    each: float
    """Seconds that it saves a step."""


def prices_of(finding: Finding, situation: Situation, prices: Prices) -> dict[Action, tuple[float, float]]:
    """(seconds once, seconds lost per remaining step) of every action that fits the finding."""
    step, count = situation.step_seconds, situation.members
    lost = min(finding.lost, 0.99) * step
    healthy = step - lost
    found: dict[Action, tuple[float, float]] = {"ignore": (0.0, lost)}
    if finding.syndrome == "non-communication slow":
        # equal shares take `healthy` on the others and `step` on this one; balanced shares end together
        balanced = count / ((count - 1) / healthy + 1 / step)
        found["re-balance"] = (prices.rebalance + step, balanced - healthy)
    elif finding.place == "link" and count > 2:
        # by way of a third member: the bytes take two usual links instead of one
        found["re-route"] = (prices.reroute + step, lost / max(finding.ratio - 1, 1e-9))
    elif finding.place != "link":
        # a member that owns no shard of the sums still sends its own values once: half of the bytes
        found["re-balance"] = (prices.rebalance + step, lost / 2)
    if finding.place != "link" and count - 1 >= max(situation.least, 1):
        found["evict"] = (prices.evict + step, healthy / (count - 1))
    return found


def choose(
    finding: Finding, situation: Situation, able: Collection[Action], prices: Prices | None = None
) -> tuple[Choice, Choice]:
    """(the best of the actions that can be carried out here, the one of all that would make steps shortest)."""
    offers = prices_of(finding, situation, prices or Prices())
    lost = offers["ignore"][1]
    choices = [
        Choice(action=action, saves=(lost - each) * situation.steps_left - once, each=lost - each)
        for action, (once, each) in offers.items()
    ]
    possible = [c for c in choices if c.action == "ignore" or c.action in able]
    return max(possible, key=lambda c: c.saves), max(choices, key=lambda c: c.each)
