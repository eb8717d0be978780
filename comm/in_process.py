"""Ranks that are threads of one process: a `Transport` between them, for trials of what ranks do."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

from heteromesh.comm.interfaces import OnceWork, Transport, Work
from heteromesh.comm.world import World

T = TypeVar("T")
_Pair = tuple[int, int, int]
"""(sender, receiver, tag)."""


class InProcessMessages:
    """The messages among `size` threads, which are the ranks. Tensors may be on any device."""

    def __init__(self, size: int, seconds: float = 60.0) -> None:
        """seconds: longest wait for a message."""
        self.size, self._seconds = size, seconds
        self._arrived = threading.Condition()
        self._sent: dict[_Pair, dict[int, torch.Tensor]] = defaultdict(dict)
        self._counts: dict[tuple[_Pair, str], int] = defaultdict(int)
        self._broken = False

    def transport(self, rank: int) -> Transport:
        """Returns the messages as one rank sees them."""
        return _Member(self, rank)

    def give_up(self) -> None:
        """Ends all waits: a thread has failed."""
        with self._arrived:
            self._broken = True
            self._arrived.notify_all()

    def number(self, pair: _Pair, end: str) -> int:
        """Counts a message at one end, from 0: the n-th sent meets the n-th received."""
        with self._arrived:
            self._counts[pair, end] += 1
            return self._counts[pair, end] - 1

    def put(self, pair: _Pair, number: int, tensor: torch.Tensor) -> None:
        """Delivers a message."""
        with self._arrived:
            self._sent[pair][number] = tensor
            self._arrived.notify_all()

    def take(self, pair: _Pair, number: int) -> torch.Tensor:
        """Waits for a message. Raises ConnectionError where it won't come."""
        with self._arrived:
            done = self._arrived.wait_for(lambda: self._broken or number in self._sent[pair], self._seconds)
            if self._broken or not done:
                raise ConnectionError(f"no message {number} from rank {pair[0]} to {pair[1]}")
            return self._sent[pair].pop(number)


def run_threads(size: int, device: torch.device, act: Callable[[World], T]) -> list[T]:
    """Returns what `act` does on each rank of a world of threads. Raises the first exception that is a rank's own."""
    messages = InProcessMessages(size)

    def member(rank: int) -> T:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return act(World(rank=rank, size=size, device=device, exchange=messages.transport(rank)))
        except BaseException:
            messages.give_up()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(member, rank) for rank in range(size)]
    errors = [e for e in (future.exception() for future in futures) if e is not None]
    # the others' waits for it have failed too
    for error in sorted(errors, key=lambda e: isinstance(e, ConnectionError)):
        raise error
    return [future.result() for future in futures]


class _Member(Transport):
    def __init__(self, messages: InProcessMessages, rank: int) -> None:
        self._messages, self._rank = messages, rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._messages.size

    def send(self, peer: int, tensor: torch.Tensor, tag: int) -> Work:
        pair = (self._rank, peer, tag)
        self._messages.put(pair, self._messages.number(pair, "sent"), tensor.detach().clone())
        return OnceWork(lambda: None)

    def recv(self, peer: int, tensor: torch.Tensor, tag: int) -> Work:
        pair = (peer, self._rank, tag)
        number = self._messages.number(pair, "received")
        return OnceWork(lambda: tensor.detach().copy_(self._messages.take(pair, number)))

    def close(self) -> None:
        self._messages.give_up()
