"""Who or what holds up a job, from its members' reports: the four syndromes of C4D (arXiv 2406.04594, section 3).

Pure functions. Only durations are compared, never the clocks of two hosts. A member's delay to another one is the
time that its bytes were arriving, by the size, as far as the sender's kernel agrees that the network was the limit: a
process that has no time to send or to read is not a slow link.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from heteromesh.faults.wire.messages import LinkUse, OperationReport

Syndrome = Literal["communication hang", "non-communication hang", "communication slow", "non-communication slow"]
Place = Literal["member", "link", "sender", "receiver", "card"]
"""The process; one connection; all that a member sends; all that it receives; both."""
Cell = tuple[int, int]
"""(sender, receiver), member ids."""
HOT = 2.5
"""A cell is hot when a byte takes this many times the lower quartile's seconds."""
SHARE = 0.2
"""Of the time: what a slow member or cell must cost to be a finding."""
ECHO = 3.0
"""A row this many times hotter than the column of the same member makes that one its echo, and the other way round."""
LEAST_BYTES = 1 << 16
"""A cell with fewer in a window says nothing of the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """One syndrome and its culprit."""

    syndrome: Syndrome
    place: Place
    members: tuple[int, ...]
    """The culprit's id; of a link (sender, receiver)."""
    operation: str
    """The collective that waits, or waited last."""
    sequence: int
    why: str
    lost: float = 1.0
    """Share of the others' time that it costs."""
    ratio: float = 1.0
    """Of a slow cell: its seconds for a byte over those of a usual cell."""

    @property
    def key(self) -> tuple[Syndrome, Place, tuple[int, ...]]:
        """Returns what is equal for the same trouble at two times."""
        return self.syndrome, self.place, self.members


@dataclass(frozen=True, slots=True)
class Window:
    """What a member did between two reports of one epoch."""

    before: OperationReport
    after: OperationReport

    @property
    def seconds(self) -> float:
        return self.after.age - self.before.age

    @property
    def blocked(self) -> float:
        """Seconds in which it could do nothing."""
        return self.after.blocked - self.before.blocked

    def late(self, other: int) -> float:
        """Seconds in which it was blocked on a member that had not begun to send."""
        before, after = self._links(other)
        return max(0.0, after.late - before.late)

    def flow(self, other: int) -> float:
        """Seconds in which bytes of the other were arriving."""
        before, after = self._links(other)
        return max(0.0, after.flow - before.flow)

    def received(self, other: int) -> int:
        """Bytes of the other."""
        before, after = self._links(other)
        return max(0, after.received - before.received)

    def network(self, other: int) -> float:
        """Seconds in which the network was the limit of what it sent to the other; infinity where that is not known."""
        before, after = (link.tcp for link in self._links(other))
        if not after.busy:
            return float("inf")
        return after.busy - after.receiver_limited - before.busy + before.receiver_limited

    def _links(self, other: int) -> tuple[LinkUse, LinkUse]:
        return self.before.links.get(other, LinkUse()), self.after.links.get(other, LinkUse())


def delays(windows: Mapping[int, Window]) -> dict[Cell, float]:
    """Seconds for a byte from each member to each other one that sent enough, or for long enough, to tell."""
    found = {}
    for receiver, window in windows.items():
        for sender in window.after.links:
            size = window.received(sender)
            flow = window.flow(sender)
            if sender in windows and (size >= LEAST_BYTES or flow > SHARE * window.seconds):
                found[sender, receiver] = min(flow, windows[sender].network(receiver)) / max(size, 1)
    return found


def slow(windows: Mapping[int, Window]) -> Diagnosis | None:
    """Returns what slows the job down most, when that is worth saying."""
    found = [finding for finding in (slow_network(windows), slow_member(windows)) if finding is not None]
    return max(found, key=lambda finding: finding.lost, default=None)


def slow_network(windows: Mapping[int, Window]) -> Diagnosis | None:
    """Finds slow communication: the hot cells of the delay matrix, and whether they are a row, a column or both."""
    matrix = delays(windows)
    if len(matrix) < 2:
        return None
    usual = max(sorted(matrix.values())[len(matrix) // 4], 1e-12)
    hot = {cell: matrix[cell] / usual for cell in matrix if matrix[cell] > HOT * usual}
    cost = {cell: _cost(windows, cell, matrix[cell], hot[cell]) for cell in hot}
    worst = max(cost, key=lambda cell: cost[cell], default=None)
    if worst is None or cost[worst] < SHARE:
        return None
    place, members = _place(matrix, hot, worst)
    last = windows[worst[1]].after
    return Diagnosis(
        syndrome="communication slow",
        place=place,
        members=members,
        operation=last.name,
        sequence=last.entered,
        why=f"{1e-6 / matrix[worst]:.3g} MB/s, 1/{hot[worst]:.0f} of what a usual link carries",
        lost=cost[worst],
        ratio=hot[worst],
    )


def _cost(windows: Mapping[int, Window], cell: Cell, delay: float, ratio: float) -> float:
    """Returns the share of the time by which the cell is longer on its way than a usual one."""
    window = windows[cell[1]]
    return min(1.0, delay * window.received(cell[0]) * (1 - 1 / ratio) / max(window.seconds, 1e-9))


def _place(matrix: Collection[Cell], hot: Mapping[Cell, float], worst: Cell) -> tuple[Place, tuple[int, ...]]:
    """Finds the hottest row or column through the worst cell. Where both of a member are hot, one may only be the
    other's echo: acknowledgements wait in the same queue."""
    heat: dict[tuple[int, int], float] = {}
    for member in worst:
        for end in (0, 1):
            cells = [cell for cell in matrix if cell[end] == member]
            # one cell is no evidence of a row or column: two members have only links
            if len(cells) > 1 and all(cell in hot for cell in cells):
                heat[member, end] = statistics.median(hot[cell] for cell in cells)
    if not heat:
        return "link", worst
    member, end = max(heat, key=lambda key: heat[key])
    if heat.get((member, 1 - end), 0.0) * ECHO > heat[member, end]:
        return "card", (member,)
    return ("sender", "receiver")[end], (member,)


def slow_member(windows: Mapping[int, Window]) -> Diagnosis | None:
    """Finds a slow member: the others wait for it, longer than the plan has them wait, and it waits least."""
    if len(windows) < 2:
        return None
    awaited = {
        m: statistics.median_low(_unplanned(windows, m, other) for other in windows if other != m) for m in windows
    }
    worst = max(windows, key=lambda m: awaited[m] - windows[m].blocked)
    seconds = max(statistics.median(window.seconds for window in windows.values()), 1e-9)
    own = windows[worst].blocked
    others = statistics.median_low(window.blocked for m, window in windows.items() if m != worst)
    if awaited[worst] - own < SHARE * seconds or own > others / 2:
        return None
    last = windows[worst].after
    beyond = " more than planned" if last.planned else ""
    return Diagnosis(
        syndrome="non-communication slow",
        place="member",
        members=(worst,),
        operation=last.name,
        sequence=last.entered,
        why=f"the others wait for it {awaited[worst] / seconds:.0%} of the time{beyond}, it waits {own / seconds:.0%}",
        lost=min(1.0, (awaited[worst] - own) / seconds),
    )


def _unplanned(windows: Mapping[int, Window], member: int, other: int) -> float:
    """Seconds that the other was late waiting for the member beyond those that its smaller share of work explains."""
    most, least = windows[member].after.planned, windows[other].after.planned
    foreseen = max(0.0, 1 - least / most) if most else 0.0
    return windows[other].late(member) - foreseen * windows[other].seconds


def hang(
    reports: Mapping[int, OperationReport], quiet: Collection[int] = (), *, deaf: bool = False
) -> Diagnosis | None:
    """Returns what a group that does not go on waits for.

    `reports`: the newest; `quiet`: members that send none any more; `deaf`: the coordinator is not answered either.
    """
    silent = [m for m in quiet if m in reports]
    if silent:
        return _quiet(reports, silent[0], deaf)
    talking = {m: r for m, r in reports.items() if m not in quiet}
    if len(talking) < 2:
        return None
    return _absent(talking) or _dead_link(talking) or _deaf(talking)


def dead_links(reports: Mapping[int, OperationReport]) -> list[Cell]:
    """Pairs of members whose bytes somebody waits for, and do not reach the other's kernel: (lower, higher).

    The one that waits may be the only one: the other has handed its bytes to its own kernel and is done.
    """
    awaited = {(min(a, b), max(a, b)) for a, r in reports.items() for b in r.waiting if b in reports}
    return sorted((a, b) for a, b in awaited if _dead(reports, a, b) or _dead(reports, b, a))


def _dead(reports: Mapping[int, OperationReport], a: int, b: int) -> bool:
    """Whether b's kernel does not acknowledge what a sends."""
    link = reports[a].links.get(b)
    return link is not None and link.tcp.retrying > 0


def _finding(
    reports: Mapping[int, OperationReport], syndrome: Syndrome, place: Place, members: Cell | tuple[int], why: str
) -> Diagnosis:
    """Names the collective that the first in it is in."""
    last = max(reports.values(), key=lambda r: (r.entered, r.within))
    return Diagnosis(
        syndrome=syndrome,
        place=place,
        members=members,
        operation=last.name,
        sequence=last.entered,
        why=why,
    )


def _quiet(reports: Mapping[int, OperationReport], member: int, deaf: bool) -> Diagnosis:
    """Tells a stopped process, whose kernel still acknowledges, from a lost host or cable, which does not."""
    unheard = [m for m in reports if m != member and _dead(reports, m, member)]
    if unheard or deaf:
        who = f"{len(unheard)} others sent" if unheard else "the coordinator sent"
        why = f"no sign of life, and its host acknowledges nothing of what {who}"
        return _finding(reports, "communication hang", "card", (member,), why)
    return _finding(
        reports, "non-communication hang", "member", (member,), "no sign of life, although its host's kernel answers"
    )


def _absent(reports: Mapping[int, OperationReport]) -> Diagnosis | None:
    """Returns the member that has not entered the collective in which others wait."""
    last = max(r.entered for r in reports.values())
    behind = [m for m, r in reports.items() if r.entered < last and not r.within]
    awaited = [m for m in behind if any(m in r.waiting for r in reports.values())] or behind
    if not awaited:
        return None
    culprit = min(awaited, key=lambda m: (reports[m].entered, -reports[m].since))
    why = f"it has not entered, {reports[culprit].since:.1f} s after its last collective"
    return _finding(reports, "non-communication hang", "member", (culprit,), why)


def _dead_link(reports: Mapping[int, OperationReport]) -> Diagnosis | None:
    """Finds, when all are in, the connection on which nothing is acknowledged, or on which both ends wait."""
    pairs = [(a, b) for a in reports for b in reports if a < b]
    dead = [(a, b) for a, b in pairs if _dead(reports, a, b) or _dead(reports, b, a)]
    why = "what is sent on it is not acknowledged"
    if not dead:
        dead = [(a, b) for a, b in pairs if b in reports[a].waiting and a in reports[b].waiting]
        why = "both ends wait for each other and nothing moves"
    if not dead:
        return None
    shared = set.intersection(*(set(pair) for pair in dead))
    if len(dead) > 1 and shared:
        return _finding(reports, "communication hang", "card", (min(shared),), f"on {len(dead)} of its links {why}")
    return _finding(reports, "communication hang", "link", dead[0], why)


def _deaf(reports: Mapping[int, OperationReport]) -> Diagnosis | None:
    """Finds a member that is in, waits for nobody, and is waited for: it computes, or does nothing."""
    idle = [m for m, r in reports.items() if not r.waiting and any(m in o.waiting for o in reports.values())]
    if not idle:
        return None
    culprit = max(idle, key=lambda m: sum(m in r.waiting for r in reports.values()))
    return _finding(
        reports, "non-communication hang", "member", (culprit,), "it is in the collective and neither sends nor waits"
    )
