"""Signs of life: who is silent, who is stuck, which connection stands still. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from heteromesh.faults.membership.deadlines import Intervals, Timing
from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.wire.messages import Message

_TOGETHER = 0.25
"""How long the loss of a silent member waits for that of others, in silence floors."""
_STALL = 2.0
"""A connection on which both ends wait stands still after this many silence floors."""


@dataclass(slots=True)
class Pulse:
    """What one member's heartbeats tell."""

    timing: Timing
    now: float
    seen: float = 0.0
    ticked: float = 0.0
    tick: int = -1
    blocked: dict[str, tuple[int, frozenset[int]]] = field(default_factory=dict)
    """By group: (epoch, members whose bytes it waits for)."""
    beats: Intervals = field(init=False)
    ticks: Intervals = field(init=False)

    def __post_init__(self) -> None:
        self.seen = self.ticked = self.now
        self.beats = Intervals(self.timing.silence, self.timing)
        self.ticks = Intervals(self.timing.stuck, self.timing)

    def beat(self, message: Message, now: float) -> None:
        """A heartbeat; malformed ones only count as a sign of life."""
        self.beats.add(now - self.seen)
        self.seen = now
        tick = message.get("tick")
        if isinstance(tick, int) and tick != self.tick:
            self.ticks.add(now - self.ticked)
            self.tick, self.ticked = tick, now
        blocked = message.get("blocked")
        if isinstance(blocked, dict):
            self.blocked = {g: (e, frozenset(on)) for g, (e, on) in blocked.items()}

    def forgive(self, seconds: float) -> None:
        """The watcher itself was late: nobody is blamed for that time."""
        self.seen += seconds
        self.ticked += seconds


class Answers:
    """A member's watch over its coordinator. One that is stopped or hangs keeps its connections and says nothing."""

    def __init__(self, timing: Timing, now: float) -> None:
        self._seen, self._gaps = now, Intervals(timing.hang, timing)

    def came(self, now: float) -> None:
        self._gaps.add(now - self._seen)
        self._seen = now

    def forgive(self, seconds: float) -> None:
        """The watcher itself was late (negative: it was not)."""
        self._seen += max(0.0, seconds)

    def check(self, now: float) -> None:
        """After everything that has come was read. Raises TimeoutError."""
        if now - self._seen > self._gaps.deadline():
            raise TimeoutError(f"the coordinator has said nothing for {now - self._seen:.1f} s")


def silent(pulses: Mapping[int, Pulse], now: float) -> list[int]:
    """Members that should have been heard of by now.

    Nobody yet while others are late too and may turn out to be silent: those behind one broken link must be lost
    together, or the first losses would put out a majority bit by bit (faults/membership/quorum.py).
    """
    late = {m: now - pulse.seen for m, pulse in pulses.items()}
    deadlines = {m: pulse.beats.deadline() for m, pulse in pulses.items()}
    found = [m for m in pulses if late[m] > deadlines[m]]
    if found and any(deadlines[m] / 2 < late[m] <= deadlines[m] for m in pulses):
        waited = max(late[m] - deadlines[m] for m in found)
        return found if waited > _TOGETHER * pulses[found[0]].timing.silence else []
    return found


def stuck(pulses: Mapping[int, Pulse], groups: Mapping[str, Epochs], now: float) -> list[int]:
    """Living members whose main thread does nothing although others of a group wait for it."""
    found = []
    for member, pulse in pulses.items():
        if pulse.blocked or now - pulse.ticked <= pulse.ticks.deadline():
            continue
        if any(_awaited(member, group, pulses) for group in groups.values()):
            found.append(member)
    return found


def _awaited(member: int, group: Epochs, pulses: Mapping[int, Pulse]) -> bool:
    if member not in group.members or member in group.fins:
        return False
    if group.fins:
        return True
    return any(
        member in pulses[other].blocked[group.name][1]
        for other in group.members
        if other != member and other in pulses and group.name in pulses[other].blocked
    )


def stalled(pulses: Mapping[int, Pulse], group: Epochs, now: float) -> list[tuple[int, int]]:
    """Pairs of members that wait for each other's bytes in this epoch while nothing moves."""
    waits = {
        m: pulses[m].blocked[group.name][1]
        for m in group.members
        if m in pulses
        and pulses[m].blocked.get(group.name, (-1, None))[0] == group.epoch
        and now - pulses[m].ticked > _STALL * pulses[m].timing.silence
    }
    return [(a, b) for a, on in waits.items() for b in on if a < b and a in waits.get(b, ())]
