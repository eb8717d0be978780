"""Faults on purpose: seeded schedules, and the means to carry them out on the processes of one machine."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

from heteromesh.comm.tcp.transport import TcpTransport

FaultKind = Literal["kill", "stop", "cut", "hold"]
"""SIGKILL; SIGSTOP; one data connection shut; the interpreter lock held (a live process that does nothing)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InjectedFault:
    """What happens to whom, and when."""

    kind: FaultKind
    slot: int
    """Index of the victim among the processes that live then."""
    delay: float
    """Seconds after the job has recovered from the one before."""


def schedule(
    seed: int, count: int, *, kinds: Sequence[FaultKind] = ("kill",), slots: int = 4, longest: float = 0.1
) -> list[InjectedFault]:
    """Returns the same faults for the same arguments. Raises ValueError for kinds that don't exist."""
    unknown = [kind for kind in kinds if kind not in get_args(FaultKind)]
    if unknown or not kinds:
        raise ValueError(f"faults are of the kinds {', '.join(get_args(FaultKind))}, got {list(kinds)}")
    dice = random.Random(seed)
    return [
        InjectedFault(kind=dice.choice(list(kinds)), slot=dice.randrange(slots), delay=dice.uniform(0, longest))
        for _ in range(count)
    ]


def kill(pid: int) -> float:
    """Sends SIGKILL; returns the moment (time.monotonic)."""
    now = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return now


def stop(pid: int) -> float:
    """Sends SIGSTOP: alive, silent, its connections open."""
    now = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    return now


def resume(pid: int) -> None:
    """Sends SIGCONT after `stop`: a process that does not know what it has missed."""
    os.kill(pid, signal.SIGCONT)


def hold_interpreter(seconds: float) -> None:
    """Blocks every Python thread of this process."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def cut(transport: TcpTransport, peer: int) -> None:
    """Breaks this rank's data connections with one peer, as a middlebox would; both processes live on."""
    for link in transport.links_to(peer):
        with suppress(OSError):
            link.sock.shutdown(socket.SHUT_RDWR)
