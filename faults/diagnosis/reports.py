"""What a member tells the coordinator of its operations: one compact message, counters that only grow.

A lost or late message costs nothing: the coordinator looks at differences between two of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields

from heteromesh.comm.tcp.info import TcpInfo
from heteromesh.comm.tcp.records import Records
from heteromesh.faults.membership.view import View
from heteromesh.faults.wire.messages import Message

PERIOD = 0.2
"""Seconds between two reports of a group of up to 32 members; more in larger ones, whose reports are longer."""


def period(size: int) -> float:
    """Seconds between two reports of a group of this many members."""
    return PERIOD * max(1.0, size / 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What one member knows of its traffic with another one; seconds and bytes since the epoch began."""

    waited: float = 0.0
    """Blocked on what the other must send."""
    late: float = 0.0
    """Of that, while none of its bytes were arriving."""
    pushed: float = 0.0
    """Blocked on what the other must take."""
    flow: float = 0.0
    """While its bytes were arriving."""
    received: int = 0
    sent: int = 0
    tcp: TcpInfo = field(default_factory=TcpInfo)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One member in one epoch of one group."""

    group: str
    epoch: int
    name: str
    """The collective that it is in, or was in last; empty before the first."""
    entered: int
    """Collectives it has entered in this epoch."""
    finished: int
    age: float
    """Seconds since the epoch's connections were made."""
    inside: float
    """Seconds in collectives that it has left."""
    since: float
    """Seconds since it entered the collective, or left the last one."""
    waiting: tuple[int, ...] = ()
    """Members whose bytes, either way, it waits for now."""
    links: Mapping[int, Link]
    """By the other member."""

    @property
    def within(self) -> bool:
        """Whether it is in a collective."""
        return self.entered > self.finished

    @property
    def blocked(self) -> float:
        """Seconds in which it could do nothing."""
        return sum(link.waited + link.pushed for link in self.links.values())


def report(view: View, records: Records, stalled: Sequence[int]) -> Message:
    """The message about one group. `stalled`: ranks that this one waits for now."""
    now = time.monotonic_ns()
    counts, tcp = records.counts(now), records.connections()
    links = []
    for rank, other in enumerate(view.members):
        if rank != view.rank:
            times = (counts.waited[rank], counts.late[rank], counts.pushed[rank], counts.flow[rank])
            moved = (counts.received[rank], counts.sent[rank])
            info = (round(v, 6) for v in astuple(tcp.get(rank, TcpInfo())))
            links.append([other, *(round(ns / 1e9, 6) for ns in times), *moved, *info])
    return {
        "kind": "records",
        "group": view.group,
        "epoch": view.epoch,
        "op": [records.name, records.entered, records.finished],
        "seconds": [round(ns / 1e9, 6) for ns in (now - records.began, records.inside, now - records.since)],
        "waiting": [view.members[rank] for rank in stalled if rank < view.size],
        "links": links,
    }


def read(message: Message) -> Report | None:
    """The report in a message; None when it is malformed."""
    try:
        name, entered, finished = message["op"]
        age, inside, since = (float(v) for v in message["seconds"])
        links = {int(other): _link(values) for other, *values in message["links"]}
        return Report(
            group=str(message["group"]),
            epoch=int(message["epoch"]),
            name=str(name),
            entered=int(entered),
            finished=int(finished),
            age=age,
            inside=inside,
            since=since,
            waiting=tuple(int(m) for m in message["waiting"]),
            links=links,
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _link(values: Sequence[float]) -> Link:
    """Raises ValueError and TypeError for anything but the numbers that `report` wrote."""
    waited, late, pushed, flow, received, sent, *tcp = values
    if len(tcp) != len(fields(TcpInfo)):
        raise ValueError("not the fields of a connection")
    rtt, retrying, retransmits, unacked, busy, receiver, buffer, rate = tcp
    return Link(
        waited=float(waited),
        late=float(late),
        pushed=float(pushed),
        flow=float(flow),
        received=int(received),
        sent=int(sent),
        tcp=TcpInfo(
            rtt=float(rtt),
            retrying=int(retrying),
            retransmits=int(retransmits),
            unacked=int(unacked),
            busy=float(busy),
            receiver_limited=float(receiver),
            buffer_limited=float(buffer),
            rate=int(rate),
        ),
    )
