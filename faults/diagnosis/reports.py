"""What a member tells the coordinator of its operations, every now and then.

The coordinator looks at differences between two reports, so a lost or late one costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields

from heteromesh.comm.tcp.info import TcpInfo
from heteromesh.comm.tcp.records import Records
from heteromesh.faults.membership.view import View
from heteromesh.faults.wire.messages import LinkUse, OperationReport

PERIOD = 0.2
"""Seconds between two reports of a group of up to 32 members; more in larger ones, whose reports are longer."""


def period(size: int) -> float:
    """Returns the seconds between two reports of a job of this many members."""
    return PERIOD * max(1.0, size / 32)


def report(view: View, records: Records, stalled: Sequence[int]) -> OperationReport:
    """Returns what this member has done in the epoch. `stalled`: ranks that it waits for now."""
    now = time.monotonic_ns()
    counts, tcp = records.counts(now), records.connections()
    links = {}
    for rank, other in enumerate(view.members):
        if rank != view.rank:
            links[other] = LinkUse(
                waited=_seconds(counts.waited[rank]),
                late=_seconds(counts.late[rank]),
                pushed=_seconds(counts.pushed[rank]),
                flow=_seconds(counts.flow[rank]),
                received=counts.received[rank],
                sent=counts.sent[rank],
                tcp=_rounded(tcp.get(rank, TcpInfo())),
            )
    return OperationReport(
        epoch=view.epoch,
        name=records.name,
        entered=records.entered,
        finished=records.finished,
        age=_seconds(now - records.began),
        inside=_seconds(records.inside),
        since=_seconds(now - records.since),
        planned=round(records.planned, 6),
        waiting=tuple(view.members[rank] for rank in stalled if rank < view.size),
        links=links,
    )


def _seconds(nanoseconds: float) -> float:
    return round(nanoseconds / 1e9, 6)


def _rounded(info: TcpInfo) -> TcpInfo:
    """Shortens the numbers: the message has those of every connection."""
    return TcpInfo(**{f.name: round(getattr(info, f.name), 6) for f in fields(info)})
