"""Messages among the ranks of one pass, point to point inside the world communicator or over a `Transport`.

No process group is made per pass (ByteScale, arXiv 2502.21231, section 4.2): any set of ranks may exchange at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from heteromesh.comm.interfaces import Work
from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.errors import UserError

Addressed = tuple[int, torch.Tensor]
"""(member of the pass, tensor)."""
ALIKE = (
    "layers must be called alike on all ranks of a pass, so draw what is skipped from torch's, Python's or NumPy's own "
    "generator, which passes seed by the step, and not from a generator of the model's or from what its tokens are; so "
    "must batch.sum and batch.last in a loss"
)
_END = 0x6D68_5F65_6E64_5F66
"""Begins the message that a rank sends when its forward is through, told apart from what peers may wait for instead."""
_LEAST = 64
"""Bytes of the smallest message that such a message may meet (AGREEMENT_BYTES)."""


class Transfer(Work):
    """Messages under way. Their buffers must not be touched before `wait` has returned; wait exactly once."""

    def __init__(
        self,
        world: World,
        name: str,
        works: Sequence[Work],
        buffers: Sequence[torch.Tensor],
        sent: int,
        received: Sequence[Addressed] = (),
    ) -> None:
        """received: (rank, tensor) of those that may hold the end of a peer's forward instead."""
        self._received = received
        self._world, self._name, self._works, self._sent = world, name, works, sent
        self._buffers = buffers  # torch keeps no reference to what it sends
        self._start, self._clock, self._done = time.time_ns(), time.perf_counter_ns(), False

    def wait(self) -> None:
        """Returns when every receive has arrived and every send buffer may be reused.

        The recorder gets one span from start to here; only the time blocked in here counts as waiting.
        """
        if self._done:
            raise RuntimeError(f"{self._name}: this transfer was waited for already")
        self._done = True
        clock = time.perf_counter_ns()
        for work in self._works:
            with _agreeing():
                work.wait()
        received, self._received = self._received, ()
        for rank, tensor in received:
            if _is_end(tensor):
                raise UserError(_ended(rank))
        now = time.perf_counter_ns()
        self._buffers = ()
        self._world.recorder.comm_ns += now - clock
        self._world.recorder.exchanged_bytes += self._sent
        self._world.recorder.add(self._name, "comm", self._start, now - self._clock, self._sent)


def _ended(rank: int) -> str:
    return f"rank {rank} has ended the forward of a pass that others are still in: {ALIKE}"


@contextmanager
def _agreeing() -> Iterator[None]:
    """Raises UserError where members of a job would meet again, and differ again."""
    try:
        yield
    except GroupAborted as error:
        if error.disagreed:
            raise UserError(f"the ranks of a pass don't wait for the same messages: {ALIKE}") from error
        raise


def _is_end(tensor: torch.Tensor) -> bool:
    if tensor.nbytes < 8:
        return False
    first = tensor.view(-1)[: -(-8 // tensor.itemsize)].view(torch.uint8)[:8]
    return int.from_bytes(first.cpu().numpy().tobytes(), sys.byteorder) == _END


class Exchange:
    """The ranks of a pass as a communicator. Every member must make the same calls in the same order."""

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        if world.rank not in ranks:
            raise ValueError(f"rank {world.rank} is not one of the pass's ranks {tuple(ranks)}")
        self.ranks = tuple(ranks)
        self.member = self.ranks.index(world.rank)
        self.device = world.device
        self._world = world
        self._is_gloo = world.device.type == "cpu" and isinstance(world.exchange, dist.ProcessGroup | None)
        self._room = [_LEAST]
        """Bytes of the largest message that has come."""

    def among(self, members: Sequence[int]) -> Exchange:
        """Returns the same exchange for some of its members, numbered as listed."""
        some = type(self)(self._world, [self.ranks[i] for i in members])
        some._room = self._room
        return some

    def start(self, sends: Sequence[Addressed], receives: Sequence[Addressed], name: str) -> Work:
        """Posts the receives, then the sends, and returns while they travel.

        Between two members messages keep their order: the n-th send to a member meets its n-th receive from here.
        Both ends must agree on dtype and size; empty tensors are not sent. Raises ValueError before anything is
        posted for members that don't exist, messages to oneself and tensors that are not contiguous or on another
        device.
        """
        for member, tensor in (*sends, *receives):
            self._check(member, tensor, name)
        buffers = [t for _, t in (*sends, *receives)]
        sent, works = sum(t.nbytes for _, t in sends), self._post(sends, receives)
        if not self._is_gloo:
            return Transfer(self._world, name, works, buffers, sent)
        self._room[0] = max(self._room[0], *(t.nbytes for _, t in receives), 0)
        return Transfer(self._world, name, works, buffers, sent, [(self.ranks[i], t) for i, t in receives])

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], name: str) -> None:
        """Sends `sends[i]` to member i and fills `receives[i]` with what member i sent to this rank.

        All tensors contiguous; sizes may differ and may be zero, but both ends must agree. Returns when every
        receive has arrived and every send buffer may be reused.
        """
        self.start_all_to_all(sends, receives, name).wait()

    def start_all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], name: str) -> Work:
        """Does what `all_to_all` does, but returns while the messages travel."""
        if not len(sends) == len(receives) == len(self.ranks):
            raise ValueError(f"{len(sends)} sends and {len(receives)} receives for {len(self.ranks)} members")
        for tensor in (*sends, *receives):
            self._check_tensor(tensor, name)
        receives[self.member].copy_(sends[self.member])
        others = [(self.member + i) % len(self.ranks) for i in range(1, len(self.ranks))]
        return self.start([(i, sends[i]) for i in others], [(i, receives[i]) for i in reversed(others)], name)

    def agree(self, number: int) -> list[int]:
        """Returns every member's whole number, in their order, when all have ended the forward of the pass.

        The 16 bytes to each are in nobody's count. Raises UserError where a member is still in an exchange of it.
        """
        own = torch.tensor([_END, number], dtype=torch.int64, device=self.device)
        # gloo ends the process where a message is longer than its receive, and takes a shorter one
        room = self._room[0] // own.itemsize + 1 if self._is_gloo else len(own)
        others = [i for i in range(len(self.ranks)) if i != self.member]
        everyone = {i: torch.empty(room, dtype=torch.int64, device=self.device) for i in others} | {self.member: own}
        works = self._post([(i, own) for i in others], [(i, everyone[i]) for i in others])
        failed: RuntimeError | None = None
        for place, work in enumerate(works):
            try:
                with _agreeing():
                    work.wait()
            except RuntimeError as error:
                failed = failed or error
                continue
            if place < len(others) and not _is_end(everyone[others[place]]):
                raise UserError(_ended(self.ranks[self.member]))
        if failed is not None:
            raise failed
        return [int(everyone[i][1]) for i in range(len(self.ranks))]

    def _post(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Sequence[Work]:
        """Posts receives first: gloo's ready-to-receive messages would queue behind data."""
        outgoing = [(self.ranks[i], t) for i, t in sends if t.numel()]
        incoming = [(self.ranks[i], t) for i, t in receives if t.numel()]
        network = self._world.exchange
        if network is not None and not isinstance(network, dist.ProcessGroup):
            with _agreeing():
                works: list[Work] = [network.recv(rank, t, Tag.PASS) for rank, t in incoming]
                return works + [network.send(rank, t, Tag.PASS) for rank, t in outgoing]
        operations = [dist.P2POp(dist.irecv, t, group=network, group_peer=rank) for rank, t in incoming]
        operations += [dist.P2POp(dist.isend, t, group=network, group_peer=rank) for rank, t in outgoing]
        return list(dist.batch_isend_irecv(operations)) if operations else []

    def _check(self, member: int, tensor: torch.Tensor, name: str) -> None:
        if not 0 <= member < len(self.ranks) or member == self.member:
            raise ValueError(
                f"{name}: member {member} is no peer of member {self.member} in a pass of {len(self.ranks)} ranks"
            )
        self._check_tensor(tensor, name)

    def _check_tensor(self, tensor: torch.Tensor, name: str) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: exchanged tensors must be contiguous, got strides {tensor.stride()}")
        if tensor.device.type != self.device.type:
            raise ValueError(f"{name}: exchanged tensors must be on {self.device}, got one on {tensor.device}")
