"""A new coordinator after the loss of the old one: what members report, and what follows from a majority of reports.

The state is a few integers. A step may have been applied only if the old coordinator had committed it, and it had only
if every member of the epoch had its result: so the most that anyone reports as committed is committed, and those who
have not heard of it hold the result and apply it. What nobody reports is summed again.
Those vote who are in the newest epoch that anyone reports, or in the one before it while not all had heard of it; so
one candidate at most gets a quorum, and none while the old coordinator has one (faults/quorum.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heteromesh.faults.epochs import Epochs
from heteromesh.faults.membership import WORLD, Applicant, Membership, Order
from heteromesh.faults.quorum import holds
from heteromesh.faults.wire import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a member knows of one group."""

    epoch: int
    committed: int
    chain: str
    stale: bool
    """Whether it lacks the state after `committed` steps."""
    members: tuple[int, ...]
    bases: tuple[tuple[int, ...], ...] = ()
    """Members of older epochs who have a say too."""

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
                bases=tuple(tuple(int(m) for m in base) for base in data["bases"]),
            )
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(slots=True)
class Election:
    """The reports that one candidate has."""

    reports: dict[int, dict[str, Report]] = field(default_factory=dict)

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
        """The newest epoch of the world group that anyone knows."""
        return max((told[WORLD] for told in self.reports.values()), key=lambda report: report.epoch)

    def quorum(self) -> bool:
        """Whether those who have reported may go on."""
        return bool(self.reports) and holds(self.reports, (self.newest.members, *self.newest.bases))

    def complete(self) -> bool:
        """Whether nobody else is to be waited for."""
        return self.quorum() and set(self.newest.members) <= self.reports.keys()

    def conclude(self, membership: Membership) -> list[Order]:
        """Fills a fresh membership that has the reporting members' people; the messages of the first epoch.

        Who has reported and was not in the newest epoch is put out.
        """
        newest = self.newest
        membership.started, membership.electing, membership.elective = True, False, True
        membership.bases = [list(base) for base in (newest.members, *newest.bases)]
        membership.counts["elections"] += 1
        seen = [m for reports in self.reports.values() for report in reports.values() for m in report.members]
        membership.last = max([membership.last, *self.reports, *seen])
        orders: list[Order] = []
        for member in [m for m in membership.people if m not in newest.members]:
            del membership.people[member]
            orders.append((member, {"kind": "fenced", "reason": "not in the last epoch of those who go on"}))
        for name in sorted({name for reports in self.reports.values() for name in reports}):
            reports = {m: r[name] for m, r in self.reports.items() if name in r}
            group = membership.groups[name] = _epochs(name, reports)
            orders += membership.begin(group)
        return orders


def _epochs(name: str, reports: Mapping[int, Report]) -> Epochs:
    newest = max(reports.values(), key=lambda report: report.epoch)
    furthest = max(reports.values(), key=lambda report: report.committed)
    group = Epochs(name, epoch=newest.epoch, committed=furthest.committed, chain=furthest.chain)
    group.members = [m for m in newest.members if m in reports]
    # one epoch behind may be one commit behind, with the result at hand; a stale one never is
    group.current = {m for m in group.members if not reports[m].stale}
    return group
