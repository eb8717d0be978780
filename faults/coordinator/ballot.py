"""A candidate's election as it goes on: whose reports are here, and who is still worth waiting for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from heteromesh.faults.coordinator.election import Election
from heteromesh.faults.wire.deadlines import Timing

_CANDIDACY = 0.8
"""Seconds after which a candidate without a quorum gives up, so that its voters may find another one."""
_GRACE = 1.2
"""Seconds that a quorum waits for members that still listen: they may be with another candidate."""
_PROBES = (0.2, 0.1)
"""A member's host accepts a connection within the first of these, in silence floors, or the packet is lost and it does
within the second."""


class Ballot:
    """Lives in the coordinator's event loop."""

    def __init__(
        self, election: Election, timing: Timing, conclude: Callable[[], None], give_up: Callable[[], None]
    ) -> None:
        """`conclude` is called when there is a quorum and nobody else will come; `give_up` when none has come."""
        self.election, self._timing = election, timing
        self._conclude, self._give_up = conclude, give_up
        self._probing: dict[int, asyncio.Task[None]] = {}
        self._gone: set[int] = set()
        self._grace: asyncio.TimerHandle | None = None
        self._over = False

    def begin(self) -> None:
        """Starts the limits; call within the loop."""
        asyncio.get_running_loop().call_later(_CANDIDACY, self._expire)

    def end(self) -> None:
        """Stops waiting for anybody."""
        self._over = True
        for task in self._probing.values():
            task.cancel()

    def lose(self, member: int) -> None:
        """Its connection has ended."""
        if self.election.reports.pop(member, None) is not None:
            self.look()

    def look(self) -> None:
        """Concludes when it is time to."""
        if self._over or not self.election.reports:
            return
        for member, addresses in self.election.missing().items():
            if member not in self._probing:
                self._probing[member] = asyncio.get_running_loop().create_task(self._probe(member, addresses))
        if not self.election.quorum():
            return
        if self.election.missing().keys() <= self._gone:
            self._conclude()
        elif self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(_GRACE, self._conclude)

    def _expire(self) -> None:
        if not self.election.quorum():
            self._give_up()

    async def _probe(self, member: int, addresses: Sequence[tuple[str, int]]) -> None:
        if not any(await asyncio.gather(*(self._listens(*address) for address in addresses))):
            self._gone.add(member)
            self.look()

    async def _listens(self, host: str, port: int) -> bool:
        """Whether the kernel of that host accepts connections there: true of stopped and of busy processes too."""
        for floors in _PROBES:
            try:
                async with asyncio.timeout(floors * self._timing.silence):
                    _, writer = await asyncio.open_connection(host, port)
            except TimeoutError:
                continue
            except OSError:
                return False
            writer.transport.abort()
            return True
        return False
