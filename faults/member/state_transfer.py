"""State for members that don't hold it: from one member that does, over the epoch's own connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from heteromesh.comm.interfaces import Work
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.collectives import wait_all
from heteromesh.comm.tcp.state_transfer import pack, receive_state, send_state
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.faults.membership.view import View


def heal(transport: TcpTransport, view: View, capture: Callable[[], Any], adopt: Callable[[Any], None]) -> None:
    """Hands the source's `capture()` to every stale member, which calls `adopt` with it; the others return at once.

    Raises GroupAborted, also when the received state is not usable; nothing has been adopted then.
    """
    source = view.source
    if source is None:
        raise GroupAborted("no member holds the state")
    if view.rank == source:
        head, tensors = pack(capture())
        works: list[Work] = []
        for rank, member in enumerate(view.members):
            if member in view.stale:
                works += send_state(transport, rank, head, tensors)
        wait_all(works)
    elif view.members[view.rank] in view.stale:
        adopt(receive_state(transport, source))
