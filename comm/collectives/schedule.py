"""The way of one tensor through a reduction, as this rank sees it: messages to post and sums to form.

Piece by piece: the ranks of a host send their contributions to the host's representative (stage GATHER), which sums
them and sends the partial sum to the owner (PARTIAL); the owner adds up the hosts' partial sums in host order and
sends the result to its own host and to the other representatives (RESULT), which hand it out on their hosts (HAND_OUT).
A host with several devices so sends each byte over its uplink once. One owner sums in one order: all get the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from heteromesh.comm.dtypes import accumulation_dtype, in_accumulation_dtype
from heteromesh.comm.interfaces import Transport, Work
from heteromesh.planner.reduction.reduction import Reduction
from heteromesh.planner.reduction.schedule import ReductionPiece, members_by_host, pieces, representatives

GATHER, PARTIAL, RESULT, HAND_OUT = range(4)
"""Stages, told apart by the tags of their messages."""


@dataclass(frozen=True, slots=True)
class StageTask:
    """Something to do when these messages have arrived."""

    stage: int
    waits: Sequence[Work]
    act: Callable[[], None]
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class PieceStep:
    """One piece's sends that wait for nothing, and what tells that the piece's result is here."""

    nbytes: int
    sends: Sequence[tuple[int, torch.Tensor, int]]
    """(peer, tensor, stage)"""
    arrived: Callable[[], object] | None


@dataclass(slots=True)
class ReductionSchedule:
    """One collective's messages on this rank.

    `sources` are the ranks whose tensors are summed (None: each piece's owner alone); `receivers` those that get the
    result, which its owner has anyway: of a sum all ranks or none. Results arrive in `flat` itself: an owner sends a
    piece's result only after it has received the whole contribution that was sent from there.
    """

    transport: Transport
    reduction: Reduction
    bounds: Sequence[int]
    """Who owns what of it."""
    flat: torch.Tensor
    tag: int
    sources: frozenset[int] | None
    receivers: frozenset[int]
    tasks: list[StageTask] = field(default_factory=list)
    steps: list[PieceStep] = field(default_factory=list)
    sends: list[Work] = field(default_factory=list)
    """Those of the tasks."""
    sent_bytes: int = 0
    _buffers: list[torch.Tensor] = field(default_factory=list)

    def post(self) -> None:
        """Posts all receives and lists the tasks and the steps."""
        among, one_way = self.receivers | (self.sources or frozenset()), not (self.receivers and self.sources)
        for piece in pieces(self.reduction, self.bounds, self.flat.element_size(), one_way=one_way):
            if piece.owner == self.transport.rank or self.transport.rank in among:
                members = members_by_host(self.reduction, piece, among)
                self._post(piece, members, representatives(self.reduction, piece, among))

    def release(self) -> None:
        """Lets go of all tensors, when everything is done: its parts refer to each other, and would live on."""
        self.tasks.clear()
        self.steps.clear()
        self.sends.clear()
        self._buffers.clear()
        self.flat = self.flat.new_empty(0)

    def send(self, peer: int, tensor: torch.Tensor, stage: int) -> Work:
        """Posts a send of this flow, which keeps the tensor alive."""
        self._buffers.append(tensor)
        self.sent_bytes += tensor.nbytes
        return self.transport.send(peer, tensor, self.tag + stage)

    def _post(self, piece: ReductionPiece, members: dict[int, list[int]], leaders: dict[int, int]) -> None:
        me, mine = self.transport.rank, self.flat[piece.start : piece.stop]
        host = self.reduction.hosts[me]
        sources = frozenset((piece.owner,)) if self.sources is None else self.sources
        host_leader = leaders[host]
        if me != host_leader:
            stage = RESULT if host_leader == piece.owner else HAND_OUT
            arrival = self._recv(host_leader, mine, stage) if self.receivers else None
            self._step(mine, [(host_leader, mine, GATHER)] if me in sources else [], arrival.wait if arrival else None)
            return
        parts, waits = [], []
        for rank in members[host]:
            if rank in sources:
                parts.append(mine if rank == me else self._buffer(mine, mine.dtype))
                if rank != me:
                    waits.append(self._recv(rank, parts[-1], GATHER))
        if me == piece.owner:
            self._own(mine, parts, waits, members, leaders, sources)
            return
        if waits:
            self.tasks.append(StageTask(GATHER, waits, lambda: self._pass_on([piece.owner], _sum(parts), PARTIAL)))
        arrived = self._hand_out(piece.owner, mine, [r for r in members[host] if r != me]) if self.receivers else None
        self._step(mine, [(piece.owner, parts[0], PARTIAL)] if parts and not waits else [], arrived)

    def _own(
        self,
        mine: torch.Tensor,
        parts: list[torch.Tensor],
        waits: list[Work],
        members: dict[int, list[int]],
        leaders: dict[int, int],
        sources: frozenset[int],
    ) -> None:
        """Sums the hosts' partial sums in host order and sends the result back."""
        me, home = self.transport.rank, self.reduction.hosts[self.transport.rank]
        sums: list[list[torch.Tensor]] = []
        for host in sorted(members):
            count = sum(r in sources for r in members[host])
            if host == home:
                sums.append(parts)
            elif count:
                # several contributions were summed there already, and are not rounded on their way
                sums.append([self._buffer(mine, mine.dtype if count == 1 else accumulation_dtype(mine.dtype))])
                waits.append(self._recv(leaders[host], sums[-1][0], PARTIAL))
        peers: list[int] = []
        if self.receivers:
            peers = [r for r in members[home] if r != me] + [leaders[h] for h in sorted(members) if h != home]
        if not waits:
            self._step(mine, [(peer, mine, RESULT) for peer in peers], None)
            return

        def act() -> None:
            _store(_sum([_sum(part) for part in sums if part]), mine)
            self._pass_on(peers, mine, RESULT)

        self.tasks.append(StageTask(PARTIAL, waits, act))

    def _hand_out(self, owner: int, mine: torch.Tensor, peers: Sequence[int]) -> Callable[[], object]:
        arrival = self._recv(owner, mine, RESULT)
        if not peers:
            return arrival.wait
        self.tasks.append(StageTask(RESULT, [arrival], lambda: self._pass_on(peers, mine, HAND_OUT)))
        return self.tasks[-1].ended.wait

    def _pass_on(self, peers: Sequence[int], tensor: torch.Tensor, stage: int) -> None:
        self.sends += [self.send(peer, tensor, stage) for peer in peers]

    def _step(
        self, mine: torch.Tensor, sends: Sequence[tuple[int, torch.Tensor, int]], arrived: Callable[[], object] | None
    ) -> None:
        if sends or arrived:
            self.steps.append(PieceStep(mine.nbytes, sends, arrived))

    def _buffer(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.empty(like.numel(), dtype=dtype)
        self._buffers.append(buffer)
        return buffer

    def _recv(self, peer: int, tensor: torch.Tensor, stage: int) -> Work:
        return self.transport.recv(peer, tensor, self.tag + stage)


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sums in the order given, in the accumulation type, maybe into the first part. One part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    total = in_accumulation_dtype(parts[0])
    for part in parts[1:]:
        total.add_(part)
    return total


def _store(total: torch.Tensor, target: torch.Tensor) -> None:
    if total.data_ptr() != target.data_ptr():
        target.copy_(total)
