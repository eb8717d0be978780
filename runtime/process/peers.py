"""Whether the other ranks are still there: a thread that watches the connections to them.

gloo waits for a peer until its time limit, ten minutes by default, and names nobody. This watch sees a closed
connection at once, and a peer whose kernel acknowledges nothing (a pulled cable, a dead host) after `limit` seconds,
from the kernel's own counts (TCP_INFO). It then shuts this process's connections down, so that whatever blocks on them
raises, and turns that error into one sentence that names the peer. A peer that is merely busy or stopped still
acknowledges and is left to the process group's time limit.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.runtime.process.failure import PeerLost

SILENCE_SECONDS = 20.0
"""Without any acknowledgement; shorter outages of a link are survived."""
GRACE_SECONDS = 0.5
"""For all to see who ended first, before a rank that saw it ends too."""
Address = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Ranks that are gone, as this rank sees it."""

    ranks: tuple[int, ...]
    silent_seconds: float
    """0: they closed their connections."""


class PeerWatch:
    """While entered, watches; at its end, turns the error that a lost peer caused into PeerLost.

    Every rank must enter it together, when all process groups are made, and must leave it before any are destroyed.
    limit: seconds of silence. way_out: what the user can do, for the sentence.
    """

    def __init__(self, world: World, limit: float, way_out: Callable[[], str]) -> None:
        self._world, self._limit, self._way_out = world, limit, way_out
        self.lost: Lost | None = None
        self._hosts: list[str] = []
        self._where: dict[Address, int] = {}
        self._watched: dict[int, tuple[int, socket.socket]] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeerWatch:
        if self._world.size > 1:
            told = self._world.gather((socket.gethostname(), _own_addresses()))
            self._hosts = [host for host, _ in told]
            self._where = _owners(told, self._world.rank)
            self._watch_one_each()
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name="heteromesh-peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if isinstance(error, RuntimeError | OSError):
            # another thread may have met the broken connection a moment before the watch did
            self._thread.join(2 * GRACE_SECONDS)
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        for _, connection in self._watched.values():
            connection.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            sentence = self._sentence(error)
            if sentence:
                raise PeerLost(sentence) from error

    def _watch_one_each(self) -> None:
        """Keeps one connection to each peer, with keepalive probes so that there is always something to answer."""
        every = max(1, round(self._limit / 4))
        watched: set[int] = set()
        for connection, peer in self._connections():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 20)
            if peer in watched:
                connection.close()
            else:
                watched.add(peer)
                self._watched[connection.fileno()] = peer, connection

    def _connections(self) -> Iterator[tuple[socket.socket, int]]:
        """Yields duplicates of this process's connections to other ranks; the caller closes them."""
        for connection in _sockets():
            try:
                peer = self._where.get(connection.getpeername()[:2])
            except OSError:
                peer = None
            if peer is None:
                connection.close()
            else:
                yield connection, peer

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        for number in self._watched:
            poll.register(number, select.POLLRDHUP)
        while self.lost is None:
            events = [number for number, _ in poll.poll(min(1.0, self._limit / 8) * 1e3)]
            if self._stop in events:
                return
            # whoever ends because a third is silent is not to blame
            silent = self._silent(self._limit / 2 if events else self._limit)
            gone = tuple(sorted(self._watched[n][0] for n in events if not self._watch_another(n, poll)))
            if silent:
                self.lost = Lost(ranks=tuple(sorted(silent)), silent_seconds=max(silent.values()))
            elif gone:
                self.lost = Lost(ranks=gone, silent_seconds=0.0)
                time.sleep(GRACE_SECONDS)
        for connection, _ in self._connections():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _watch_another(self, number: int, poll: select.poll) -> bool:
        """Returns whether another connection to the same peer is still open, and watches that from now on.

        A connection may have ended because it was one of an earlier `fit` in these processes, whose groups are closed
        one rank after the other; those of a process that ends all end.
        """
        peer, ended = self._watched[number]
        found: socket.socket | None = None
        for connection, other in self._connections():
            if found is None and other == peer and not _has_ended(connection):
                found = connection
            else:
                connection.close()
        if found is None:
            return False
        poll.unregister(number)
        del self._watched[number]
        ended.close()
        self._watched[found.fileno()] = peer, found
        poll.register(found, select.POLLRDHUP)
        return True

    def _silent(self, limit: float) -> dict[int, float]:
        """Returns seconds since the last acknowledgement, of peers that owe one for longer than `limit`."""
        found = {}
        for peer, connection in self._watched.values():
            owes, seconds = _unanswered(connection)
            if owes and seconds >= limit:
                found[peer] = seconds
        return found

    def _sentence(self, error: Exception) -> str:
        where = f"rank {self._world.rank} (host {self._hosts[self._world.rank]})"
        during = f"in step {self._world.recorder.step}" if self._world.recorder.step else "before the first step"
        during += f", while {_doing(error)}"
        if self.lost is None:
            if "Timed out waiting" not in str(error):  # gloo's words
                return ""
            return (
                f"{where} waited too long for other ranks {during}, and all of them still answer: one is stuck, or "
                f"timeout_seconds is too short; {self._way_out()}"
            )
        who = self._names(self.lost.ranks)
        if self.lost.silent_seconds:
            have, look = ("has", "that host") if len(self.lost.ranks) == 1 else ("have", "those hosts")
            what = f"{who} {have} not answered {where} for {self.lost.silent_seconds:.0f} s"
            return f"{what} ({during}): look at {look} and the network between, then {self._way_out()}"
        return (
            f"{who} ended, seen by {where} {during}: its own output says why (none where it was killed); "
            f"{self._way_out()}"
        )

    def _names(self, ranks: tuple[int, ...]) -> str:
        hosts = list(dict.fromkeys(self._hosts[rank] for rank in ranks))
        several = "s" if len(ranks) > 1 else ""
        return f"rank{several} {', '.join(map(str, ranks))} (host{'s' if len(hosts) > 1 else ''} {', '.join(hosts)})"


def _has_ended(connection: socket.socket) -> bool:
    """Whether the peer has closed its end."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _sockets() -> Iterator[socket.socket]:
    """Yields duplicates of this process's TCP sockets; the caller closes them."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
            yield found
        else:
            found.close()


def _own_addresses() -> list[Address]:
    addresses = set()
    for found in _sockets():
        with found:
            addresses.add(found.getsockname()[:2])
    return sorted(addresses)


def _owners(told: list[tuple[str, list[Address]]], own: int) -> dict[Address, int]:
    """Returns the rank behind each address, given every rank's host and addresses.

    Loopback addresses count on one's own host only; what several ranks have says nothing.
    """
    owners: dict[Address, set[int]] = {}
    for rank, (host, addresses) in enumerate(told):
        for address in addresses:
            if host == told[own][0] or not address[0].startswith(("127.", "::1", "::ffff:127.")):
                owners.setdefault(address, set()).add(rank)
    return {address: min(ranks) for address, ranks in owners.items() if len(ranks) == 1 and own not in ranks}


def _unanswered(connection: socket.socket) -> tuple[bool, float]:
    """Whether the peer's kernel owes an acknowledgement, and seconds since its last one (Linux, struct tcp_info)."""
    try:
        raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72)
    except OSError:
        return False, 0.0
    probes = raw[3]
    numbers = struct.unpack_from("16I", raw, 8)
    unacked, last_ack_ms = numbers[4], numbers[12]
    return bool(probes or unacked), last_ack_ms / 1e3


_DOING: Mapping[str, str] = {
    "heteromesh.comm.gradients.reducer": "summing gradients",
    "heteromesh.comm.collectives.uneven": "summing gradients",
    "heteromesh.comm.exchange": "exchanging a pass's tensors",
    "heteromesh.comm.world": "exchanging small messages",
    "heteromesh.runtime.work.feed": "waiting for the plan",
    "heteromesh.runtime.records.checkpoint": "writing a checkpoint",
    "heteromesh.runtime.engine.calibrate": "measuring the model",
}


def _doing(error: BaseException) -> str:
    """Says what the innermost of our communicating functions was about."""
    found, trace = "communicating", error.__traceback__
    while trace is not None:
        found = _DOING.get(str(trace.tb_frame.f_globals.get("__name__")), found)
        trace = trace.tb_next
    return found
