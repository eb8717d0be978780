"""All-to-all among the ranks of one pass: point-to-point messages inside the world communicator.

No process group is made per pass (ByteScale, arXiv 2502.21231, section 4.2): any set of ranks may exchange at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from heteromesh.comm.world import World


class Exchange:
    """The ranks of a pass as a communicator. Every member must make the same calls in the same order."""

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        if world.rank not in ranks:
            raise ValueError(f"rank {world.rank} is not one of the pass's ranks {tuple(ranks)}")
        self.ranks = tuple(ranks)
        self.member = self.ranks.index(world.rank)
        self._world = world

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], name: str) -> None:
        """Sends `sends[i]` to member i and fills `receives[i]` with what member i sent to this rank.

        All tensors contiguous; sizes may differ and may be zero, but both ends must agree. Returns when every
        receive has arrived and every send buffer may be reused.
        """
        if not len(sends) == len(receives) == len(self.ranks):
            raise ValueError(f"{len(sends)} sends and {len(receives)} receives for {len(self.ranks)} members")
        for tensor in (*sends, *receives):
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: exchanged tensors must be contiguous, got strides {tensor.stride()}")
        receives[self.member].copy_(sends[self.member])
        start, clock = time.time_ns(), time.perf_counter_ns()
        operations = self._operations(sends, receives)
        works = dist.batch_isend_irecv(operations) if operations else []
        for work in works:
            work.wait()
        elapsed = time.perf_counter_ns() - clock
        sent = sum(t.nbytes for i, t in enumerate(sends) if i != self.member)
        self._world.recorder.comm_ns += elapsed
        self._world.recorder.add(name, "comm", start, elapsed, sent)

    def _operations(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> list[dist.P2POp]:
        others = [(self.member + i) % len(self.ranks) for i in range(1, len(self.ranks))]
        group = self._world.exchange
        # receives first: gloo's ready-to-receive messages would queue behind data
        incoming = [
            dist.P2POp(dist.irecv, receives[i], self.ranks[i], group) for i in reversed(others) if receives[i].numel()
        ]
        outgoing = [dist.P2POp(dist.isend, sends[i], self.ranks[i], group) for i in others if sends[i].numel()]
        return incoming + outgoing
