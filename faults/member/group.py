"""A group of members with collectives that can be aborted at any moment and built again in milliseconds.

Groups are independent: each has its own epochs, connections and abort state, and a failure in one is seen by no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from heteromesh.comm.tcp import collectives
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.collectives import CheckedSum
from heteromesh.comm.tcp.connect import Place, build
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.faults.diagnosis import reports
from heteromesh.faults.membership.view import View

if TYPE_CHECKING:
    from heteromesh.faults.member.member import Member

T = TypeVar("T")


class Group:
    """One thread owns a group. Ranks are those of the current epoch and change with it.

    Every collective raises GroupAborted when the epoch ends under it: its outputs are undefined then, its inputs
    untouched (in-place sums keep a copy to that end), and `ready` waits for the next epoch. `ready` and everything else
    raise Fenced and Stopped when there is no next one.
    """

    def __init__(self, member: Member, name: str) -> None:
        self._member, self.name = member, name
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
        """The epoch of the last `ready`."""
        if self._view is None:
            raise RuntimeError(f"group {self.name} has no epoch before the first ready()")
        return self._view

    @property
    def transport(self) -> TcpTransport:
        """For other collectives over `Transport`; valid until the epoch ends. Call them through `run`."""
        if self._transport is None:
            raise GroupAborted(f"group {self.name} is between two epochs: call ready()")
        return self._transport

    def ready(self) -> View:
        """Returns in an epoch that is current and connected. Blocks until there is one."""
        while True:
            live = self._transport is not None and self._transport.abort.error is None
            if live and self._member.is_newest(self.name, self.view.epoch):
                return self.view
            self._leave(None)
            view, abort = self._member.await_view(self.name, self._spent)
            self._view = view
            place = Place(
                addresses=view.addresses,
                rank=view.rank,
                epoch=view.epoch,
                group=self.name,
                links=self._member.terms.links,
            )
            try:
                self._transport = build(self._member.listener, place, self._member.terms.secret, abort, self._missing)
            except GroupAborted as error:
                abort.close()
                self._leave(error)
            finally:
                self._missing.clear()

    def run(self, collective: Callable[[TcpTransport], T]) -> T:
        """The collective's result; when it is aborted, the group leaves the epoch and GroupAborted goes on."""
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
        """The sum of all members' `source` in `target`, or in `source` itself when there is none."""
        kept = source.clone() if target is None else source
        result = source if target is None else target
        try:
            return self.run(lambda t: collectives.all_reduce(t, kept, result, contributes=contributes, checked=checked))
        except GroupAborted:
            if target is None:
                source.copy_(kept)
            raise

    def reduce_scatter(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """This member's shard (`tcp_collectives.shards`) of the sum in `target`; the mask of contributing ranks."""
        return self.run(lambda t: collectives.reduce_scatter(t, source, target))

    def all_gather(self, parts: Sequence[torch.Tensor]) -> None:
        """Fills `parts[i]` from rank i; sizes may differ."""
        self.run(lambda t: collectives.all_gather(t, parts))

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Rank `root`'s values on every rank."""
        self.run(lambda t: collectives.broadcast(t, tensor, root))

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> None:
        """`sends[i]` to rank i, `receives[i]` from rank i."""
        self.run(lambda t: collectives.all_to_all(t, sends, receives))

    def send(self, tensor: torch.Tensor, rank: int, tag: int = 0) -> None:
        """Returns when the tensor may be reused."""
        self.run(lambda t: t.send(rank, tensor, tag).wait())

    def recv(self, tensor: torch.Tensor, rank: int, tag: int = 0) -> None:
        """Returns when the tensor has arrived."""
        self.run(lambda t: t.recv(rank, tensor, tag).wait())

    def blocked(self) -> tuple[int, list[int]] | None:
        """(epoch, members whose bytes are waited for now), for the heartbeat; None when nothing is waited for."""
        view, transport = self._view, self._transport
        if view is None:
            return None
        ranks: Sequence[int] = transport.stalled_on() if transport is not None else sorted(self._missing)
        return (view.epoch, [view.members[r] for r in ranks if r < view.size]) if ranks else None

    def report(self, now: float) -> dict[str, Any] | None:
        """What the coordinator should know of the group's operations; None when that was told a moment ago.

        `now`: time.monotonic().
        """
        view, transport = self._view, self._transport
        if view is None or transport is None or transport.epoch != view.epoch:
            return None
        if now - self._reported < reports.period(view.size):
            return None
        self._reported = now
        return reports.report(view, transport.records, transport.stalled_on())

    def tell(self, message: dict[str, Any]) -> None:
        """To the coordinator, about this group."""
        self._member.send({**message, "group": self.name, "epoch": self.view.epoch})

    def verdict(self, step: int) -> bool:
        """Whether the step was committed; waits until that is decided."""
        return self._member.await_verdict(self.name, self.view.epoch, step)

    def committed(self) -> tuple[int, str]:
        """(steps committed, hash chain)."""
        return self._member.committed(self.name)

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
        if error is not None and self._member.is_newest(self.name, self._spent):
            peer = None if error.peer is None else self._view.members[error.peer]
            self.tell({"kind": "fail", "peer": peer, "reason": str(error)})
