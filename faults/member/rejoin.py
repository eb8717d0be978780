"""A member's part in an election: finds the new coordinator, or becomes it. Who only waited to join joins again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from heteromesh.errors import UserError
from heteromesh.faults.coordinator.election import Election
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.control import Control
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.faults.wire.discovery import Address, Search
from heteromesh.faults.wire.messages import ControlMessage, FromMember, Refused, Welcome

STAGGER = 0.05
"""Seconds that the member of the next rank waits longer before it becomes a candidate."""
LIMIT = 6.0
"""Seconds without a coordinator after which a member gives up: it is cut off from the majority."""
_LOOK = 0.02
_ANSWER = 2.0
"""Seconds that a candidate has to answer."""


def rejoin(
    addresses: Sequence[Address],
    secret: bytes,
    report: FromMember,
    *,
    began: float,
    rank: int | None,
    stand: Callable[[], Coordinator | None],
    wanted: Callable[[], bool],
) -> tuple[Control, list[ControlMessage]] | str:
    """Returns a control connection to the elected coordinator and what it has said so far, or why there is none.

    `report`: the rejoin message, or a join message of one that has no rank yet. Blocks until LIMIT seconds after
    `began`, or until not `wanted`. `stand` starts a candidate here, once.
    """
    standing = rank is None
    reason = "no coordinator was elected: this member is cut off from the majority"
    with Search(addresses, secret) as search:
        while wanted() and time.monotonic() - began < LIMIT:
            found = search.look(_LOOK)
            if found is not None:
                control = Control(*found)
                with suppress(OSError):  # it has given up meanwhile
                    answers = control.ask(report, seconds=_ANSWER)
                    if isinstance(answers[0], Welcome):
                        return control, answers
                    control.close()
                    return refusal(answers[0])
            elif rank is not None and not standing and time.monotonic() - began >= rank * STAGGER:
                standing = stand() is not None
    return reason


def refusal(answer: ControlMessage) -> str:
    """Returns the reason in an answer that is no welcome."""
    return answer.reason if isinstance(answer, Refused) else "the coordinator did not welcome this process"


def candidate(
    addresses: Sequence[Address], secret: bytes, bounds: Bounds, timing: Timing, own: int
) -> Coordinator | None:
    """Returns a coordinator on the first of these addresses that is of this host and free. `own`: this member."""
    for host, port in addresses:
        try:
            election = Election()
            return Coordinator(
                secret, host=host, port=port, bounds=bounds, timing=timing, election=election, own=own
            ).start()
        except UserError:
            continue
    return None
