"""A new coordinator after the loss of the old one: what members report, and what follows from a majority of reports.

The state is a few integers. A step may have been applied only if the old coordinator had committed it, and it had only
if every member of the epoch had its result: so the most that anyone reports as committed is committed, and those who
have not heard of it hold the result and apply it. What nobody reports is summed again.
Those vote who are in the newest epoch that may have become known to all of it, and in the ones before while it had not
yet; so one candidate at most gets a quorum, and none while the old coordinator has one (faults/membership/quorum.py).
Members report the newest epoch that they have told the old coordinator to know of. One in which there is a member that
has not told so cannot have become known to all, and never will: it has no say, and nothing was committed in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.membership.membership import WORLD, Applicant, Membership, Order
from heteromesh.faults.membership.quorum import holds
from heteromesh.faults.wire.messages import Message

_APART = 1000
"""The lost coordinator may have counted on for so many epochs meanwhile."""
_SPREAD = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a member knows of one group."""

    epoch: int
    """The newest epoch that it has told its coordinator to know of; the first one if it came to none."""
    committed: int
    chain: str
    stale: bool
    """Whether it lacks the state after `committed` steps."""
    members: tuple[int, ...]
    known: int
    """The newest epoch that it has heard of."""
    bases: tuple[tuple[int, ...], ...] = ()
    """Members of older epochs who have a say too."""
    addresses: tuple[tuple[tuple[str, int], ...], ...] = ()
    """Where the members listen, in their order."""

    @classmethod
    def read(cls, data: Any) -> Report | None:
        """From a message; None when it is malformed."""
        try:
            return cls(
                epoch=int(data["epoch"]),
                committed=int(data["committed"]),
                chain=str(data["chain"]),
                stale=bool(data["stale"]),
                members=tuple(int(m) for m in data["members"]),
                known=int(data["known"]),
                bases=tuple(tuple(int(m) for m in base) for base in data["bases"]),
                addresses=tuple(tuple((str(h), int(p)) for h, p in person) for person in data["addresses"]),
            )
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(slots=True)
class Election:
    """The reports that one candidate has."""

    reports: dict[int, dict[str, Report]] = field(default_factory=dict)
    apart: int = field(default_factory=lambda: secrets.randbelow(_SPREAD))
    """Unlike any other candidate's, so that two elected from the same reports never give two epochs one number."""

    def add(self, message: Message) -> tuple[int, Applicant] | str:
        """A member's rejoin message; the reason when it is refused."""
        member, applicant, told = message.get("member"), Applicant.read(message), message.get("groups")
        if not isinstance(member, int) or applicant is None or not isinstance(told, dict):
            return "a rejoin message that is malformed"
        reports = {str(name): Report.read(data) for name, data in told.items()}
        if WORLD not in reports or None in reports.values():
            return "a rejoin message that is malformed"
        self.reports[member] = {name: report for name, report in reports.items() if report is not None}
        return member, applicant

    @property
    def newest(self) -> Report:
        """The newest epoch of the world group that may have become known to all of it."""
        told = [reports[WORLD] for reports in self.reports.values()]
        return max((report for report in told if self._counts(report)), key=lambda report: report.epoch)

    def _counts(self, report: Report) -> bool:
        """Always true of the oldest epoch that anyone reports."""
        there = (self.reports[m][WORLD] for m in report.members if m in self.reports)
        return all(other.epoch >= report.epoch for other in there)

    def quorum(self) -> bool:
        """Whether those who have reported may go on."""
        return bool(self.reports) and holds(self.reports, (self.newest.members, *self.newest.bases))

    def missing(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """Who of the newest epoch has not reported, and where it listened."""
        newest = self.newest
        pairs = zip(newest.members, newest.addresses, strict=False)
        return {member: addresses for member, addresses in pairs if member not in self.reports}

    def complete(self) -> bool:
        """Whether nobody else is to be waited for."""
        return self.quorum() and set(self.newest.members) <= self.reports.keys()

    def conclude(self, membership: Membership) -> list[Order]:
        """Fills a fresh membership that has the reporting members' people; the messages of the first epoch.

        Who has reported and was in no epoch since the newest that counts is put out.
        """
        newest = self.newest
        membership.started, membership.electing, membership.elective = True, False, True
        membership.bases = [list(base) for base in (newest.members, *newest.bases)]
        membership.counts["elections"] += 1
        seen = [m for reports in self.reports.values() for report in reports.values() for m in report.members]
        membership.last = max([membership.last, *self.reports, *seen])
        staying = {
            m for told in self.reports.values() if told[WORLD].epoch >= newest.epoch for m in told[WORLD].members
        }
        orders: list[Order] = []
        for member in [m for m in membership.people if m not in staying]:
            del membership.people[member]
            orders.append((member, {"kind": "fenced", "reason": "not in the last epoch of those who go on"}))
        kept = {m: told for m, told in self.reports.items() if m in staying}
        for name in sorted({name for told in kept.values() for name in told}):
            group = membership.groups[name] = _epochs(name, {m: told[name] for m, told in kept.items() if name in told})
            group.epoch += _APART + self.apart
            orders += membership.begin(group)
        return orders


def _epochs(name: str, reports: Mapping[int, Report]) -> Epochs:
    newest = max(reports.values(), key=lambda report: report.epoch)
    furthest = max(reports.values(), key=lambda report: report.committed)
    known = max(report.known for report in reports.values())
    group = Epochs(name, epoch=known, committed=furthest.committed, chain=furthest.chain)
    everyone = dict.fromkeys(m for report in (newest, *reports.values()) for m in report.members)
    group.members = [m for m in everyone if m in reports]
    # one epoch behind may be one commit behind, with the result at hand; a stale one never is
    group.current = {m for m in group.members if not reports[m].stale}
    return group
