"""One epoch of a fault-isolated group as a `World`: whatever it is used for can be aborted and done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from heteromesh.comm.codec import from_tensor, to_tensor
from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.records import Recorder
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.faults.member.group import EpochGroup


class EpochWorld(World):
    """The members of the epoch that the group is in, as ranks. Everything raises GroupAborted when the epoch ends.

    There are no torch process groups behind it: one thread uses `gather`, `broadcast`, `once`, `sum` and `barrier`,
    several may use `exchange` and `collectives`.
    """

    __slots__ = ("_collectives", "_group", "_open", "_over", "epoch")

    def __init__(
        self,
        group: EpochGroup,
        recorder: Recorder,
        *,
        fresh: bool = False,
        collectives: Callable[[EpochWorld], Collectives] | None = None,
    ) -> None:
        """`fresh`: see comm/world.py. `collectives` makes what gradients are summed with, at its first use."""
        self._group, self._open, self._over = group, collectives, False
        view = group.view
        self._collectives: Collectives | None = None
        super().__init__(
            rank=view.rank,
            size=view.size,
            exchange=group.transport,
            recorder=recorder,
            members=view.members,
            names=view.names,
            fresh=fresh,
        )
        self.epoch = view.epoch

    @property
    def collectives(self) -> Collectives | None:
        """Opens when first asked for; closed with the epoch. Raises GroupAborted when the epoch is over."""
        if self._collectives is None and self._open is not None:
            if self._over:
                raise GroupAborted(f"epoch {self.epoch} is over")
            self._collectives = self._open(self)
        return self._collectives

    @collectives.setter
    def collectives(self, value: Collectives | None) -> None:
        self._collectives = value

    def close(self) -> None:
        """Closes the collectives; call it when the group has left the epoch, so that none of their threads waits."""
        self._over = True
        opened, self._collectives = self._collectives, None
        if opened is not None:
            opened.close()

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's `value` (comm/codec.py says of what), in rank order, on every rank."""
        if self.size == 1:
            return [value]
        mine = to_tensor(value)
        sizes = [torch.tensor([mine.numel() if rank == self.rank else 0]) for rank in range(self.size)]
        self._group.all_gather(sizes)
        parts = [
            mine if rank == self.rank else torch.empty(int(size), dtype=torch.uint8) for rank, size in enumerate(sizes)
        ]
        self._group.all_gather(parts)
        return [from_tensor(part) for part in parts]

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        data = to_tensor(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._group.broadcast(size, 0)
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._group.broadcast(data, 0)
        return value if self.rank == 0 else from_tensor(data)

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        """Sums a CPU vector over the ranks, in place: equal bits on all of them."""
        if self.size > 1:
            self._group.all_reduce(vector)
        return vector

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self.gather(None)
