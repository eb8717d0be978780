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

from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.membership.membership import Membership, Order
from heteromesh.faults.membership.quorum import holds
from heteromesh.faults.wire.messages import EpochReport, Evicted, Rejoin

_APART = 1000
"""The lost coordinator may have counted on for so many epochs meanwhile."""
_SPREAD = 1 << 20


@dataclass(slots=True)
class Election:
    """The reports that one candidate has."""

    reports: dict[int, EpochReport] = field(default_factory=dict)
    apart: int = field(default_factory=lambda: secrets.randbelow(_SPREAD))
    """Unlike any other candidate's, so that two elected from the same reports never give two epochs one number."""

    def add(self, message: Rejoin) -> None:
        """Takes a member's report."""
        self.reports[message.member] = message.report

    @property
    def newest(self) -> EpochReport:
        """Returns the newest epoch that may have become known to all of it."""
        return max((r for r in self.reports.values() if self._counts(r)), key=lambda report: report.epoch)

    def _counts(self, report: EpochReport) -> bool:
        """Always true of the oldest epoch that anyone reports."""
        return all(self.reports[m].epoch >= report.epoch for m in report.members if m in self.reports)

    def quorum(self) -> bool:
        """Tells whether those who have reported may go on."""
        return bool(self.reports) and holds(self.reports, (self.newest.members, *self.newest.quorum_sets))

    def missing(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """Returns who of the newest epoch has not reported, and where it listened."""
        newest = self.newest
        pairs = zip(newest.members, newest.addresses, strict=False)
        return {member: addresses for member, addresses in pairs if member not in self.reports}

    def conclude(self, membership: Membership) -> list[Order]:
        """Fills a fresh membership that has the reporting members' people; returns the messages of the first epoch.

        Who has reported and was in no epoch since the newest that counts is put out.
        """
        newest = self.newest
        membership.started, membership.electing, membership.elective = True, False, True
        membership.quorum_sets = [list(members) for members in (newest.members, *newest.quorum_sets)]
        membership.counts["elections"] += 1
        seen = [m for report in self.reports.values() for m in report.members]
        membership.last = max([membership.last, *self.reports, *seen])
        staying = {m for report in self.reports.values() if report.epoch >= newest.epoch for m in report.members}
        orders: list[Order] = []
        for member in [m for m in membership.people if m not in staying]:
            del membership.people[member]
            orders.append((member, Evicted("not in the last epoch of those who go on")))
        membership.world = _epochs({m: report for m, report in self.reports.items() if m in staying})
        membership.world.epoch += _APART + self.apart
        return orders + membership.begin()


def _epochs(reports: Mapping[int, EpochReport]) -> Epochs:
    newest = max(reports.values(), key=lambda report: report.epoch)
    furthest = max(reports.values(), key=lambda report: report.committed)
    known = max(report.known for report in reports.values())
    epochs = Epochs(epoch=known, committed=furthest.committed, chain=furthest.chain)
    everyone = dict.fromkeys(m for report in (newest, *reports.values()) for m in report.members)
    epochs.members = [m for m in everyone if m in reports]
    # one epoch behind may be one commit behind, with the result at hand; a stale one never is
    epochs.current = {m for m in epochs.members if not reports[m].stale}
    return epochs
