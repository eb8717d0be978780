"""One epoch of a fault-isolated group as a `World`: whatever it is used for can be aborted and done again."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from heteromesh.comm.records import Recorder
from heteromesh.comm.world import World
from heteromesh.faults.member.group import Group


class EpochWorld(World):
    """The members of the epoch that the group is in, as ranks. Everything raises GroupAborted when the epoch ends.

    Only what talks to all ranks from one thread works (`gather`, `broadcast`, `once`, `barrier` and the exchanges of
    passes); there are no torch process groups behind it.
    """

    __slots__ = ("_group",)

    def __init__(self, group: Group, recorder: Recorder) -> None:
        view = group.view
        super().__init__(rank=view.rank, size=view.size, exchange=group.transport, recorder=recorder)
        self._group = group

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        mine = _bytes(value)
        sizes = [torch.tensor([mine.numel() if rank == self.rank else 0]) for rank in range(self.size)]
        self._group.all_gather(sizes)
        parts = [
            mine if rank == self.rank else torch.empty(int(size), dtype=torch.uint8) for rank, size in enumerate(sizes)
        ]
        self._group.all_gather(parts)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value` on every rank."""
        if self.size == 1:
            return value
        data = _bytes(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._group.broadcast(size, 0)
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._group.broadcast(data, 0)
        return value if self.rank == 0 else pickle.loads(data.numpy().tobytes())

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self.gather(None)


def _bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
