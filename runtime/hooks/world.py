"""The world as an evaluating hook has it: where one rank's hook raises, the others don't wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World

T = TypeVar("T")


class PeerRaised(Exception):
    """The hook has raised on another rank, which tells why."""


class HookWorld(World):
    """A world for one call of a hook on every rank: whatever it is used for is preceded by "still here"."""

    __slots__ = ("_inner", "_turn")

    def __init__(self, inner: World, turn: Callable[[], None] = lambda: None) -> None:
        """turn: returns when this rank may exchange something."""
        self._turn = turn
        super().__init__(
            rank=inner.rank,
            size=inner.size,
            device=inner.device,
            recorder=inner.recorder,
            cluster=inner.cluster,
            members=inner.members,
            names=inner.names,
            fresh=inner.fresh,
        )
        self._inner = inner

    def run(self, call: Callable[[World], T]) -> T:
        """Returns what `call` returns here. Raises its error where it raises, and PeerRaised on all other ranks."""
        try:
            result = call(self)
        except (GroupAborted, PeerRaised):
            raise
        except Exception:
            self._turn()
            self._inner.gather((False, None))
            raise
        self.barrier()
        return result

    def gather(self, value: Any) -> list[Any]:
        self._turn()
        everyone = self._inner.gather((True, value))
        if not all(present for present, _ in everyone):
            raise PeerRaised("the hook has raised on another rank")
        return [value for _, value in everyone]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value if self.rank == 0 else None)[0]

    def broadcast_tensors(self, tensors: Iterable[torch.Tensor], source: int = 0) -> None:
        self.barrier()
        self._inner.broadcast_tensors(tensors, source)

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        self.barrier()
        return self._inner.sum(vector)

    def barrier(self) -> None:
        self.gather(None)
