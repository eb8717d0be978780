"""The engine of the rings: blocks travel by a schedule while the last ones are worked on; partial results go home.

One step: post the receives and sends of the next round (and of the partial results of the last), work on the blocks
that are here, wait. A block that passes through is sent on from the very buffer it arrived in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from heteromesh.comm.exchange import Addressed, Exchange
from heteromesh.parallel.attention.layout import pick, rows_of
from heteromesh.planner.splitting.layout import Layout, Segment
from heteromesh.planner.splitting.routes import RingMessage, Schedule

Tensors = Sequence[torch.Tensor]
"""Of one block, rows first, all with the same number of rows."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of `origin` that are on this rank."""

    origin: int
    segments: tuple[Segment, ...]
    tensors: Tensors


Visit = Callable[[Block], Tensors]
"""Works on a block; what it returns (per row of the block) goes to the origin."""
Deliver = Callable[[tuple[Segment, ...], Tensors], None]
"""Takes a partial result for these segments of this rank's own rows."""


class Circulation:
    """Runs the schedule of one layout for this member."""

    def __init__(self, exchange: Exchange, layout: Layout, schedule: Schedule) -> None:
        self._exchange, self._me = exchange, exchange.member
        self._own = layout.segments[self._me]
        self._rounds = schedule.of(self._me).rounds

    def run(self, own: Tensors, visit: Visit, name: str, home: Tensors = (), deliver: Deliver | None = None) -> None:
        """Visits every block once, this rank's own first.

        own: this rank's block, contiguous. home: one tensor per tensor that a visit returns, of the shape of this
        rank's own (only shape, dtype and device are looked at); where given, `deliver` gets the partial results of
        other ranks, always in the same order.
        """
        here = [Block(self._me, self._own, own)]
        results: dict[int, tuple[Block, Tensors]] = {}
        for step in range(len(self._rounds) + (2 if home else 1)):
            travelling = self._round(step)
            returning = self._round(step - 2) if home else ()
            arriving = [_landing(m, own) for m in travelling if m.target == self._me]
            returned = [(m, _landing_home(m, home)) for m in returning if m.origin == self._me and m.used]
            sends, receives = self._travel(travelling, here, arriving)
            sends += [a for m in returning if m.target == self._me and m.used for a in _send_home(m, results)]
            receives += [(m.target, t) for m, tensors in returned for t in tensors]
            transfer = self._exchange.start(sends, receives, name) if sends or receives else None
            results = {block.origin: (block, visit(block)) for block in here}
            if transfer:
                transfer.wait()
            for message, tensors in returned:
                assert deliver is not None
                deliver(message.used, tensors)
            here = arriving

    def _round(self, step: int) -> tuple[RingMessage, ...]:
        return self._rounds[step] if 0 <= step < len(self._rounds) else ()

    def _travel(
        self, messages: Sequence[RingMessage], here: Sequence[Block], arriving: Sequence[Block]
    ) -> tuple[list[Addressed], list[Addressed]]:
        held = {block.origin: block for block in here}
        landing = {block.origin: block for block in arriving}
        sends: list[Addressed] = []
        receives: list[Addressed] = []
        for m in messages:
            if m.source == self._me:
                rows = rows_of(held[m.origin].segments, m.segments)
                sends += [(m.target, pick(t, rows)) for t in held[m.origin].tensors]
            elif m.target == self._me:
                receives += [(m.source, t) for t in landing[m.origin].tensors]
        return sends, receives


def _rows(segments: Sequence[Segment]) -> int:
    return sum(map(len, segments))


def _landing(m: RingMessage, like: Tensors) -> Block:
    return Block(m.origin, m.segments, [t.new_empty(_rows(m.segments), *t.shape[1:]) for t in like])


def _landing_home(m: RingMessage, like: Tensors) -> Tensors:
    return [t.new_empty(_rows(m.used), *t.shape[1:]) for t in like]


def _send_home(m: RingMessage, results: dict[int, tuple[Block, Tensors]]) -> list[Addressed]:
    block, tensors = results[m.origin]
    rows = rows_of(block.segments, m.used)
    return [(m.origin, pick(t, rows)) for t in tensors]
