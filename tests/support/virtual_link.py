"""Links in virtual time: messages arrive at once, and clocks that travel with them say how long they would have taken.

What is timed by these clocks does not depend on what else the machine does. A rank has one card: what it sends leaves
one message after the other at its rate; it receives from all others at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from heteromesh.comm.exchange import Addressed, Exchange
from heteromesh.comm.world import World

LATENCY = 1e-4


class Clock:
    """Of one rank and its card."""

    def __init__(self, bytes_per_second: float, hiccups: random.Random | None) -> None:
        self.now = self.card_free = 0.0
        self.held_up = 0
        self._rate, self._hiccups = bytes_per_second, hiccups

    def send(self, nbytes: int) -> float:
        """When a message that is posted now has left."""
        hiccup = self._hiccups is not None and self._hiccups.random() < 0.05
        self.held_up += hiccup
        self.card_free = max(self.card_free, self.now) + (3 if hiccup else 1) * nbytes / self._rate
        return self.card_free


class _Message:
    """A message and the stamp that follows it; waiting moves the clock to the stamp."""

    def __init__(self, clock: Clock, act: Callable[..., Any], tensor: torch.Tensor, peer: int, group: Any) -> None:
        self._clock = clock
        self._until = clock.send(tensor.nbytes) if act is dist.isend else 0.0
        self._stamp = torch.tensor([self._until + LATENCY], dtype=torch.float64)
        self._works = [act(t, peer, group) for t in (tensor, self._stamp)]

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._clock.now = max(self._clock.now, self._until or float(self._stamp))


@contextmanager
def virtual_link(world: World, bytes_per_second: float, timed: Sequence[Any], hiccups: int = 0) -> Iterator[Clock]:
    """Within the block this rank's exchanges take virtual time, by which the modules `timed` tell the time.

    Barriers set all ranks' clocks to the latest. hiccups: a seed; one message in 20 takes three times as long.
    """
    clock = Clock(bytes_per_second, random.Random(hiccups * world.size + world.rank) if hiccups else None)
    barrier = World.barrier

    def meet(at: World) -> None:
        barrier(at)
        clock.now = max(at.gather(clock.now))

    def post(exchange: Exchange, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> list[_Message]:
        ordered = [(dist.irecv, *each) for each in receives] + [(dist.isend, *each) for each in sends]
        group = exchange._world.exchange
        return [_Message(clock, act, t, exchange.ranks[i], group) for act, i, t in ordered if t.numel()]

    tells = SimpleNamespace(perf_counter=lambda: clock.now)
    patches: list[Any] = [patch.object(World, "barrier", meet), patch.object(Exchange, "_post", post)]
    patches += [patch.object(module, "time", tells) for module in timed]
    for each in patches:
        each.start()
    try:
        yield clock
    finally:
        for each in patches:
            each.stop()
