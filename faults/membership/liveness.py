"""Signs of life: who is silent, who is stuck, which connection stands still. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.wire.deadlines import Intervals, Timing
from heteromesh.faults.wire.messages import Heartbeat

_TOGETHER = 0.25
"""How long the loss of a silent member waits for that of others, in silence floors."""
_STALL = 2.0
"""A connection on which both ends wait stands still after this many silence floors."""


@dataclass(slots=True)
class MemberLiveness:
    """What one member's heartbeats tell."""

    timing: Timing
    now: float
    seen: float = 0.0
    ticked: float = 0.0
    tick: int = -1
    waiting: frozenset[int] = frozenset()
    """Members whose bytes it waits for."""
    waiting_in: int = -1
    """The epoch in which it waits."""
    beats: Intervals = field(init=False)
    ticks: Intervals = field(init=False)

    def __post_init__(self) -> None:
        self.seen = self.ticked = self.now
        self.beats = Intervals(self.timing.silence, self.timing)
        self.ticks = Intervals(self.timing.stuck, self.timing)

    def beat(self, message: Heartbeat | None, now: float) -> None:
        """Counts a heartbeat; one that is malformed (None) is a sign of life and no more."""
        self.beats.add(now - self.seen)
        self.seen = now
        if message is None:
            return
        if message.tick is not None and message.tick != self.tick:
            self.ticks.add(now - self.ticked)
            self.tick, self.ticked = message.tick, now
        self.waiting, self.waiting_in = frozenset(message.waiting), message.waiting_in

    def compensate(self, seconds: float) -> None:
        """Adds the time by which the watcher itself was late: nobody is blamed for that time."""
        self.seen += seconds
        self.ticked += seconds


class CoordinatorLiveness:
    """A member's watch over its coordinator. One that is stopped or hangs keeps its connections and says nothing."""

    def __init__(self, timing: Timing, now: float, floor: float) -> None:
        """`floor`: seconds of silence that are always waited for."""
        self._seen, self._gaps = now, Intervals(floor, timing)

    def heard(self, now: float) -> None:
        self._gaps.add(now - self._seen)
        self._seen = now

    def compensate(self, seconds: float) -> None:
        """Adds the time by which the watcher itself was late (negative: it was not)."""
        self._seen += max(0.0, seconds)

    def check(self, now: float) -> None:
        """Raises TimeoutError; call it when everything that has come was read."""
        if now - self._seen > self._gaps.deadline():
            raise TimeoutError(f"the coordinator has said nothing for {now - self._seen:.1f} s")


def silent(liveness: Mapping[int, MemberLiveness], now: float) -> list[int]:
    """Returns members that should have been heard of by now.

    Nobody yet while others are late too and may turn out to be silent: those behind one broken link must be lost
    together, or the first losses would put out a majority bit by bit (faults/membership/quorum.py).
    """
    late = {m: now - one.seen for m, one in liveness.items()}
    deadlines = {m: one.beats.deadline() for m, one in liveness.items()}
    found = [m for m in liveness if late[m] > deadlines[m]]
    if found and any(deadlines[m] / 2 < late[m] <= deadlines[m] for m in liveness):
        waited = max(late[m] - deadlines[m] for m in found)
        return found if waited > _TOGETHER * liveness[found[0]].timing.silence else []
    return found


def stuck(liveness: Mapping[int, MemberLiveness], epochs: Epochs, now: float) -> list[int]:
    """Returns living members whose main thread does nothing although others wait for it."""
    return [
        member
        for member, one in liveness.items()
        if not one.waiting and now - one.ticked > one.ticks.deadline() and _awaited(member, epochs, liveness)
    ]


def _awaited(member: int, epochs: Epochs, liveness: Mapping[int, MemberLiveness]) -> bool:
    if member not in epochs.members or member in epochs.votes:
        return False
    others = (liveness[other] for other in epochs.members if other != member and other in liveness)
    return bool(epochs.votes) or any(member in other.waiting for other in others)


def stalled(liveness: Mapping[int, MemberLiveness], epochs: Epochs, now: float) -> list[tuple[int, int]]:
    """Returns pairs of members that wait for each other's bytes in this epoch while nothing moves."""
    waits = {
        m: liveness[m].waiting
        for m in epochs.members
        if m in liveness
        and liveness[m].waiting_in == epochs.epoch
        and now - liveness[m].ticked > _STALL * liveness[m].timing.silence
    }
    return [(a, b) for a, on in waits.items() for b in on if a < b and a in waits.get(b, ())]
