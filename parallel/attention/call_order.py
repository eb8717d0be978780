"""Which layers called attention in a pass, in order: the same on all its ranks, else keys of other layers were
exchanged.

Where shapes match, nothing else would tell. The ranks compare after the forward of a split pass, before any gradient.
"""

from __future__ import annotations

import zlib

from heteromesh.comm.exchange import ALIKE, Exchange
from heteromesh.errors import UserError
from heteromesh.parallel.attention.scope import backward_number


class CallOrder:
    """The calls of one split pass on this rank."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.layer = ""
        """The layer that the forward is in, or the one that it has left last."""
        self._calls: list[str] = []

    def note(self) -> None:
        """Notes a call of the forward; what a backward computes again follows from it."""
        if backward_number() == -1:
            self._calls.append(self.layer)

    def agree(self, then: str = "") -> None:
        """Returns when every member's forward has made the same calls since the last time. Raises UserError otherwise.

        then: what all members are about to exchange.
        """
        self._calls += [then] if then else []
        mine = len(self._calls) << 32 | zlib.crc32("\n".join(self._calls).encode())
        self._calls.clear()
        told = self._exchange.agree(mine)
        other = next((i for i, number in enumerate(told) if number != told[0]), None)
        if other is None:
            return
        counts = [number >> 32 for number in told]
        raise UserError(
            f"rank {self._exchange.ranks[0]} of a pass called attention {counts[0]} times and rank "
            f"{self._exchange.ranks[other]} {counts[other]} times, or of other layers: {ALIKE}"
        )
