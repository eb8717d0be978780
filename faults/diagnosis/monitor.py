"""The coordinator's view of how the job goes: gathers reports, says each diagnosis in one line, keeps the events."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heteromesh.faults.diagnosis.diagnosis import Diagnosis, Window, dead_links, delays, hang, slow
from heteromesh.faults.diagnosis.events import Events
from heteromesh.faults.diagnosis.policy import Eviction, Situation, price_eviction
from heteromesh.faults.diagnosis.reports import PERIOD
from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.membership.membership import Membership, Order
from heteromesh.faults.wire.messages import Evicted, OperationReport

SPAN = 2.0
"""Seconds of reports that a diagnosis of slowness compares, at least."""
_STEPS = 4
"""That it compares, at least."""
_EVERY = 0.5
"""Seconds between two looks for slowness."""
_TIMES = 3
"""Looks in a row that must find the same before it is said."""
_RECORD = 10.0
"""Seconds between two delay matrices among the events."""
_FRESH = 1.0
_KEPT = 256
"""Reports of a member, and looks at commits: a few steps of ten seconds each."""
WORLD = "world"
"""What lines and events call all members of the job."""
_log = logging.getLogger("heteromesh.faults")


@dataclass(slots=True)
class _Trouble:
    """A slowness that lasts."""

    finding: Diagnosis
    looks: int = 1
    missed: int = 0
    steps: int = 0
    """Steps when it was first seen."""
    said: str | None = None
    """What the last line about it says was done."""


@dataclass(slots=True)
class _GroupStatus:
    """What is known of the job's members together."""

    reports: dict[int, deque[tuple[float, OperationReport]]] = field(default_factory=dict)
    commits: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    trouble: _Trouble | None = None
    epoch: int = 0
    looked: float = 0.0
    recorded: float = 0.0
    dead: dict[tuple[int, int], float] = field(default_factory=dict)
    """Links on which nothing is acknowledged, and since when."""

    def newest(self, members: Collection[int]) -> dict[int, OperationReport]:
        """Returns the newest epoch that anybody has reported of."""
        last = {m: held[-1][1] for m, held in self.reports.items() if held and m in members}
        epoch = max((r.epoch for r in last.values()), default=0)
        return {m: r for m, r in last.items() if r.epoch == epoch}

    def span(self, now: float) -> float:
        """Returns the seconds to compare: of a few steps, as some wait for others at each one's end, in turns."""
        if not self.commits or self.commits[0][1] == self.commits[-1][1]:
            return SPAN
        earlier = [t for t, steps in self.commits if steps <= self.commits[-1][1] - _STEPS]
        return max(SPAN, now - (earlier or [self.commits[0][0]])[-1])

    def windows(self, members: Sequence[int], now: float) -> dict[int, Window]:
        """Returns all members' windows, or none: who is missing may be the one that all wait for."""
        found, span = {}, self.span(now)
        for member in members:
            held = self.reports.get(member, ())
            recent = [(t, r) for t, r in held if now - t <= span + _FRESH]
            if not recent or now - recent[-1][0] > _FRESH or recent[-1][1].epoch != self.epoch:
                return {}
            base = next((r for t, r in recent if now - t <= span), recent[-1][1])
            window = Window(base, recent[-1][1])
            if window.seconds < span / 2:
                return {}
            found[member] = window
        return found


class Monitor:
    """Used by the coordinator's thread; `events.entries` may be read by any."""

    def __init__(
        self,
        *,
        directory: Path | None = None,
        say: Callable[[str], None] = _log.warning,
        evicts: bool = False,
        steps: int | None = None,
    ) -> None:
        """`directory`: of the run, for events.jsonl. `say` gets each line. `evicts`: a member that is only slow is put
        out when that costs the job less than to keep it. `steps`: of the whole job, where that is known.

        Raises UserError when the directory cannot be written.
        """
        self.events = Events(directory)
        self._say, self._steps, self._evicts = say, steps, evicts
        self._status = _GroupStatus()
        self._names: dict[int, str] = {}

    def heard(self, member: int, report: OperationReport, now: float) -> None:
        """Keeps a member's report."""
        held = self._status.reports.setdefault(member, deque(maxlen=_KEPT))
        if held and held[-1][1].epoch != report.epoch:
            held.clear()
        held.append((now, report))

    def observe(self, membership: Membership, orders: Iterable[Order]) -> None:
        """Notes what has changed: who came, who went and why, which epochs began."""
        reasons = {member: message.reason for member, message in orders if isinstance(message, Evicted)}
        for member in [m for m in self._names if m not in membership.people]:
            self._lost(member, reasons.get(member, "left"))
        for member, person in membership.people.items():
            if member not in self._names:
                self._names[member] = f"{person.name} at {person.addresses[0][0]}"
                self.events.add("joined", member=member, name=person.name, address=person.addresses[0][0])
        world, status = membership.world, self._status
        if status.epoch != world.epoch:
            status.epoch, status.trouble = world.epoch, None
            status.dead.clear()
            names = [membership.people[m].name for m in world.members if m in membership.people]
            self.events.add(
                "epoch",
                group=WORLD,
                epoch=world.epoch,
                members=list(world.members),
                names=names,
                committed=world.committed,
            )

    def ended(self, reason: str) -> None:
        """Notes that the job, or this coordinator's part in it, is over."""
        self.events.add("ended", reason=reason)

    def hung(self, membership: Membership, why: str, members: Sequence[int], *, deaf: bool = False) -> None:
        """Says what holds a group up, before something is done about it.

        `why`: "silent" or "stuck", the member is put out; "stalled", the two members' group connects again. `deaf`:
        the silent member's kernel does not acknowledge what it is sent.
        """
        world = membership.world
        if not set(members) <= set(world.members):
            return
        reports = self._status.newest(world.members)
        found = hang(reports, members if why == "silent" else (), deaf=deaf)
        if why == "stalled":
            done, fits = "connections are made again", found is not None and found.syndrome == "communication hang"
        else:
            done, fits = "evicted", found is not None and found.members == tuple(members)
        if found is None or not fits:
            found = _seen(reports, why, members)
        self._tell(world, found, done, done)

    def moves(self, member: int, now: float) -> bool:
        """Whether others have just got bytes of a member, who cannot be dead then: its heartbeats are held up."""
        for other, held in self._status.reports.items():
            if other == member or len(held) < 2 or now - held[-1][0] > 2 * PERIOD:
                continue
            if Window(held[-2][1], held[-1][1]).received(member):
                return True
        return False

    def dead_links(self, world: Epochs, now: float, seconds: float) -> list[tuple[int, int]]:
        """Pairs of members for whose bytes somebody has waited so long while none were acknowledged."""
        status = self._status
        reports = status.newest(world.members)
        found = dead_links(reports) if any(r.epoch == world.epoch for r in reports.values()) else []
        status.dead = {pair: status.dead.get(pair, now) for pair in found}
        return [pair for pair, since in status.dead.items() if now - since > seconds]

    def slow(self, membership: Membership, now: float) -> list[int]:
        """Looks for slowness; returns the members that must be put out for it."""
        status, world = self._status, membership.world
        if now - status.looked < _EVERY:
            return []
        status.looked = now
        status.commits.append((now, world.committed))
        windows = status.windows(world.members, now)
        if len(windows) < 2:
            return []
        if now - status.recorded >= _RECORD:
            status.recorded = now
            self._record(world, windows)
        self._follow(status, slow(windows), world)
        if status.trouble is not None and status.trouble.looks >= _TIMES:
            return self._advise(membership, world, status, windows)
        return []

    def _follow(self, status: _GroupStatus, found: Diagnosis | None, world: Epochs) -> None:
        """Follows up a finding: the same again, another one, or none any more."""
        trouble = status.trouble
        if trouble is not None and found is not None and found.key == trouble.finding.key:
            trouble.finding, trouble.looks, trouble.missed = found, trouble.looks + 1, 0
            return
        if trouble is not None and trouble.said is not None and trouble.missed < _TIMES:
            trouble.missed += 1
            return
        if trouble is not None and trouble.said is not None:
            self.events.add("cleared", syndrome=trouble.finding.syndrome, members=list(trouble.finding.members))
        status.trouble = None if found is None else _Trouble(found, steps=world.committed)

    def _advise(
        self, membership: Membership, world: Epochs, status: _GroupStatus, windows: dict[int, Window]
    ) -> list[int]:
        trouble = status.trouble
        assert trouble is not None
        since = world.committed - trouble.steps
        situation = Situation(
            members=len(world.members),
            min_members=membership.bounds.min,
            step_seconds=_step_seconds(status, windows),
            steps_left=since if self._steps is None else max(0, self._steps - world.committed),
        )
        eviction = price_eviction(trouble.finding, situation)
        evicts = self._evicts and eviction is not None and eviction.saves > 0
        action = "evict" if evicts else "ignore"
        if action != trouble.said:
            trouble.said = action
            self._record(world, windows)
            self._tell(world, trouble.finding, action, "evicted" if evicts else _not_done(eviction, situation))
        return list(trouble.finding.members) if evicts else []

    def _tell(self, world: Epochs, found: Diagnosis, action: str, done: str) -> None:
        self.events.add(
            "diagnosis",
            syndrome=found.syndrome,
            place=found.place,
            members=list(found.members),
            names=[self._names.get(m, "").partition(" at ")[0] for m in found.members],
            ranks=[world.members.index(m) for m in found.members if m in world.members],
            group=WORLD,
            epoch=world.epoch,
            operation=found.operation,
            sequence=found.sequence,
            why=found.why,
            lost=round(found.lost, 3),
            action=action,
        )
        where = f"{found.operation or 'no collective yet'} {found.sequence} of group {WORLD}"
        self._say(f"{found.syndrome}: {self._who(world, found)} in {where}: {found.why}; done: {done}")

    def _who(self, world: Epochs, found: Diagnosis) -> str:
        each = [self._person(world, m) for m in found.members]
        if found.place == "link":
            return f"link {each[0]} to {each[1]}"
        return {"sender": "sending of ", "receiver": "receiving of ", "card": "network card of "}.get(
            found.place, ""
        ) + each[0]

    def _person(self, world: Epochs, member: int) -> str:
        rank = f"rank {world.members.index(member)}" if member in world.members else f"member {member}"
        return f"{rank} ({self._names.get(member, 'unknown')})"

    def _lost(self, member: int, reason: str) -> None:
        name = self._names.pop(member)
        self.events.add("lost", member=member, name=name.partition(" at ")[0], reason=reason)
        self._status.reports.pop(member, None)
        if reason not in ("left", "silent", "stuck", "slow"):  # said already, or nothing to say
            self._say(f"member {member} ({name}) is lost: {reason}; done: the others go on without it")

    def _record(self, world: Epochs, windows: dict[int, Window]) -> None:
        if not self.events.kept:
            return
        matrix = delays(windows)
        self.events.add(
            "records",
            group=WORLD,
            epoch=world.epoch,
            names=[self._names.get(m, "").partition(" at ")[0] for m in world.members],
            delays=[[matrix.get((s, r)) for r in world.members] for s in world.members],
            seconds=[round(windows[m].seconds, 3) for m in world.members],
            blocked=[round(windows[m].blocked, 3) for m in world.members],
        )


def _seen(reports: dict[int, OperationReport], why: str, members: Sequence[int]) -> Diagnosis:
    """Returns what the heartbeats alone tell."""
    last = max(reports.values(), key=lambda r: r.entered, default=None)
    return Diagnosis(
        syndrome="communication hang" if why == "stalled" else "non-communication hang",
        place="link" if why == "stalled" else "member",
        members=tuple(members),
        operation=last.name if last is not None else "",
        sequence=last.entered if last is not None else 0,
        why={"silent": "no sign of life", "stuck": "it does nothing while others wait"}.get(
            why, "both ends wait for each other and nothing moves"
        ),
    )


def _step_seconds(status: _GroupStatus, windows: dict[int, Window]) -> float:
    """Returns the seconds of the last commits' steps, or of collectives where nothing is committed."""
    recent = [(t, n) for t, n in status.commits if status.commits[-1][0] - t <= 10 * SPAN]
    steps = recent[-1][1] - recent[0][1]
    if steps > 0:
        return (recent[-1][0] - recent[0][0]) / steps
    window = next(iter(windows.values()))
    return window.seconds / max(1, window.after.finished - window.before.finished)


def _not_done(eviction: Eviction | None, situation: Situation) -> str:
    if eviction is None or eviction.each <= 0:
        return "nothing, no action would help"
    return f"nothing yet (to evict would save {eviction.each:.3g} s of a step's {situation.step_seconds:.3g} s)"
