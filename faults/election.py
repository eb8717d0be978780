"""A new coordinator after the loss of the old one: what members report, and what follows from a majority of reports.

The state is a few integers. A step may have been applied only if the old coordinator had committed it, and it had only
if every member of the epoch had its result: so the most that anyone reports as committed is committed, and those who
have not heard of it hold the result and apply it. What nobody reports is summed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heteromesh.faults.epochs import Epochs
from heteromesh.faults.membership import WORLD, Applicant, Membership, Order
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
            )
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(slots=True)
class Election:
    """The reports that one candidate has. `electorate`: the world group's members in its last epoch."""

    electorate: Sequence[int]
    reports: dict[int, dict[str, Report]] = field(default_factory=dict)

    def add(self, message: Message) -> tuple[int, Applicant] | str:
        """A member's rejoin message; the reason when it is refused."""
        member, applicant, told = message.get("member"), Applicant.read(message), message.get("groups")
        if not isinstance(member, int) or applicant is None or not isinstance(told, dict):
            return "a rejoin message that is malformed"
        if member not in self.electorate:
            return f"member {member} was not in the last epoch of those who elect a coordinator"
        reports = {str(name): Report.read(data) for name, data in told.items()}
        if WORLD not in reports or None in reports.values():
            return "a rejoin message that is malformed"
        self.reports[member] = {name: report for name, report in reports.items() if report is not None}
        return member, applicant

    def quorum(self) -> bool:
        """More than half of the last epoch's members: two candidates cannot both have that."""
        return 2 * len(self.reports) > len(self.electorate)

    def complete(self) -> bool:
        return len(self.reports) == len(self.electorate)

    def conclude(self, membership: Membership) -> list[Order]:
        """Fills a fresh membership that has the reporting members' people; the messages of the first epoch."""
        membership.started, membership.electing = True, False
        membership.counts["elections"] += 1
        seen = [m for reports in self.reports.values() for report in reports.values() for m in report.members]
        membership.last = max([membership.last, *self.electorate, *seen])
        orders: list[Order] = []
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
