"""Every message tag in one place: messages with different tags don't meet, whatever transport they share."""

from __future__ import annotations

from enum import IntEnum


class Tag(IntEnum):
    """The first tag of each kind of message; a kind that needs several takes those that follow it."""

    PASS = 0
    """A pass's exchanges, which keep their order between two ranks."""
    UNEVEN = 1 << 14
    """Collectives of uneven owners: 2**14 tags, four of each collective."""
    INT8 = 1 << 15
    """Sums in int8: 2**14 tags, two of each sum (contributions and results)."""
    SUM = 1 << 16
    """Direct sums called one at a time: contributions, sums of chunks, whole small vectors."""
    MOVE = (1 << 16) + 3
    """Gathers, broadcasts and all-to-alls called one at a time."""
    DIRECT = (1 << 16) + 8
    """As SUM and MOVE, of the sums that a thread of `DirectCollectives` works through."""
    STATE = (1 << 16) + 16
    """A member's state on its way to another."""
    PARAMETERS = (1 << 16) + 32
    """Updated parameters from their owners."""
    SUMS = (1 << 16) + 33
    """Sums of gradients from their owners, for whoever mirrors these."""
