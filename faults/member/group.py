"""A group of members with collectives that can be aborted at any moment and built again in milliseconds.

Jobs are independent: each has its own epochs, connections and abort state, and a failure in one is seen by no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from heteromesh.comm.tcp import collectives
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.collectives import CheckedSum
from heteromesh.comm.tcp.connect import Place, build
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.faults.diagnosis import reports
from heteromesh.faults.membership.view import View
from heteromesh.faults.wire.messages import EndJob, Healed, LinkFailed, OperationReport, Vote

if TYPE_CHECKING:
    from heteromesh.faults.member.member import Member

T = TypeVar("T")


class EpochGroup:
    """One thread owns a group. Ranks are those of the current epoch and change with it.

    Every collective raises GroupAborted when the epoch ends under it: its outputs are undefined then, its inputs
    untouched (in-place sums keep a copy to that end), and `ready` waits for the next epoch. `ready` and everything else
    raise Fenced and Stopped when there is no next one.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._transport: TcpTransport | None = None
        self._view: View | None = None
        self._spent = -1
        self._missing: set[int] = set()
        self._moved = 0
        self._reported = 0.0

    @property
    def moved(self) -> int:
        """Grows while bytes move; the sign of progress in heartbeats."""
        transport = self._transport
        return self._moved + (transport.moved if transport is not None else 0)

    @property
    def view(self) -> View:
        """Returns the epoch of the last `ready`."""
        if self._view is None:
            raise RuntimeError("the group has no epoch before the first ready()")
        return self._view

    @property
    def transport(self) -> TcpTransport:
        """Returns what other collectives go over until the epoch ends. Call them through `run`."""
        if self._transport is None:
            raise GroupAborted("the group is between two epochs: call ready()")
        return self._transport

    def ready(self) -> View:
        """Returns in an epoch that is current and connected. Blocks until there is one."""
        while True:
            live = self._transport is not None and self._transport.abort.error is None
            if live and self._member.is_newest(self.view.epoch):
                return self.view
            self._leave(None)
            view, abort = self._member.await_view(self._spent)
            self._view = view
            place = Place(
                addresses=view.addresses,
                rank=view.rank,
                epoch=view.epoch,
                links=self._member.options.links,
            )
            try:
                self._transport = build(self._member.listener, place, self._member.options.secret, abort, self._missing)
            except GroupAborted as error:
                abort.close()
                self._leave(error)
            finally:
                self._missing.clear()

    def run(self, collective: Callable[[TcpTransport], T]) -> T:
        """Returns the collective's result; when it is aborted, the group leaves the epoch and GroupAborted goes on."""
        try:
            return collective(self.transport)
        except GroupAborted as error:
            self._leave(error)
            raise

    def all_reduce(
        self,
        source: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        contributes: bool = True,
        checked: bool = True,
    ) -> CheckedSum:
        """Puts the sum of all members' `source` in `target`, or in `source` itself when there is none."""
        kept = source.clone() if target is None else source
        result = source if target is None else target
        try:
            return self.run(lambda t: collectives.all_reduce(t, kept, result, contributes=contributes, checked=checked))
        except GroupAborted:
            if target is None:
                source.copy_(kept)
            raise

    def all_gather(self, parts: Sequence[torch.Tensor]) -> None:
        """Fills `parts[i]` from rank i; sizes may differ."""
        self.run(lambda t: collectives.all_gather(t, parts))

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Puts rank `root`'s values on every rank."""
        self.run(lambda t: collectives.broadcast(t, tensor, root))

    def waiting(self) -> tuple[int, tuple[int, ...]]:
        """Returns (epoch, members whose bytes are waited for now), for the heartbeat."""
        view, transport = self._view, self._transport
        if view is None:
            return -1, ()
        ranks: Sequence[int] = transport.stalled_on() if transport is not None else sorted(self._missing)
        return view.epoch, tuple(view.members[r] for r in ranks if r < view.size)

    def report(self, now: float) -> OperationReport | None:
        """Returns what the coordinator should know of the operations; None when that was told a moment ago.

        `now`: time.monotonic().
        """
        view, transport = self._view, self._transport
        if view is None or transport is None or transport.epoch != view.epoch:
            return None
        if now - self._reported < reports.period(view.size):
            return None
        self._reported = now
        return reports.report(view, transport.records, transport.stalled_on())

    def vote(self, step: int, digest: str) -> None:
        """Says that this member has a step's result, which `decision` is about."""
        self._member.send(Vote(epoch=self.view.epoch, step=step, digest=digest))

    def healed(self, step: int) -> None:
        """Says that this member has the state after so many steps."""
        self._member.send(Healed(epoch=self.view.epoch, step=step))

    def end_job(self, reason: str) -> None:
        """Ends the job for all its members."""
        self._member.send(EndJob(reason))

    def decision(self, step: int) -> bool:
        """Returns whether the step was committed; waits until that is decided."""
        return self._member.await_decision(self.view.epoch, step)

    def committed(self) -> tuple[int, str]:
        """Returns (steps committed, hash chain)."""
        return self._member.committed()

    def close(self) -> None:
        """Leaves the epoch; the member stays in the job."""
        self._leave(None)

    def _leave(self, error: GroupAborted | None) -> None:
        """Closes the epoch's connections; tells of a failure that was not the coordinator's decision."""
        if self._view is None or self._spent >= self._view.epoch:
            return
        self._spent = self._view.epoch
        if self._transport is not None:
            self._moved += self._transport.moved + 1
            self._transport.close()
            self._transport = None
        if error is not None and self._member.is_newest(self._spent):
            peer = None if error.peer is None else self._view.members[error.peer]
            self._member.send(LinkFailed(epoch=self._spent, peer=peer, reason=str(error)))
