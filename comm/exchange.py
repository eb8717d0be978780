"""Messages among the ranks of one pass, point to point inside the world communicator or over a `Transport`.

No process group is made per pass (ByteScale, arXiv 2502.21231, section 4.2): any set of ranks may exchange at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from heteromesh.comm.interfaces import Work
from heteromesh.comm.tags import Tag
from heteromesh.comm.world import World

Addressed = tuple[int, torch.Tensor]
"""(member of the pass, tensor)."""


class Transfer(Work):
    """Messages under way. Their buffers must not be touched before `wait` has returned; wait exactly once."""

    def __init__(
        self, world: World, name: str, works: Sequence[Work], buffers: Sequence[torch.Tensor], sent: int
    ) -> None:
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
            work.wait()
        now = time.perf_counter_ns()
        self._buffers = ()
        self._world.recorder.comm_ns += now - clock
        self._world.recorder.exchanged_bytes += self._sent
        self._world.recorder.add(self._name, "comm", self._start, now - self._clock, self._sent)


class Exchange:
    """The ranks of a pass as a communicator. Every member must make the same calls in the same order."""

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        if world.rank not in ranks:
            raise ValueError(f"rank {world.rank} is not one of the pass's ranks {tuple(ranks)}")
        self.ranks = tuple(ranks)
        self.member = self.ranks.index(world.rank)
        self.device = world.device
        self._world = world

    def among(self, members: Sequence[int]) -> Exchange:
        """Returns the same exchange for some of its members, numbered as listed."""
        return type(self)(self._world, [self.ranks[i] for i in members])

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
        return Transfer(self._world, name, self._post(sends, receives), buffers, sum(t.nbytes for _, t in sends))

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
        """Returns every member's whole number, in their order; the 8 bytes to each are in nobody's count."""
        own = torch.tensor([number], dtype=torch.int64, device=self.device)
        everyone = [own if i == self.member else torch.zeros_like(own) for i in range(len(self.ranks))]
        others = [i for i in range(len(self.ranks)) if i != self.member]
        works = self._post([(i, own) for i in others], [(i, everyone[i]) for i in others])
        for work in works:
            work.wait()
        return [int(told) for told in everyone]

    def _post(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Sequence[Work]:
        """Posts receives first: gloo's ready-to-receive messages would queue behind data."""
        outgoing = [(self.ranks[i], t) for i, t in sends if t.numel()]
        incoming = [(self.ranks[i], t) for i, t in receives if t.numel()]
        network = self._world.exchange
        if network is not None and not isinstance(network, dist.ProcessGroup):
            works: list[Work] = [network.recv(rank, t, Tag.PASS) for rank, t in incoming]
            return works + [network.send(rank, t, Tag.PASS) for rank, t in outgoing]
        operations = [dist.P2POp(dist.irecv, t, rank, network) for rank, t in incoming]
        operations += [dist.P2POp(dist.isend, t, rank, network) for rank, t in outgoing]
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
