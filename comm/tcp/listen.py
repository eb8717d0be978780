"""One listening socket (or one per NIC) of a process: takes data connections of every group and epoch.

Foreign traffic is dropped and counted; connections for an epoch that this process has not heard of yet are kept for it.
"""

from __future__ import annotations

import errno
import json
import resource
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heteromesh.comm.tcp.auth import ANSWER_HEAD, Acceptor, AuthError

HANDSHAKE_SECONDS = 5.0
_PAUSE = 0.05
"""Seconds before connections are accepted again when no descriptors were left."""
_MOST, _SHARE = 256, 8
"""At most so many connections at once have not proved themselves, and no more than this part of the descriptors that
the process may have: the others are for its own files and for connections that have."""


def most_handshakes() -> int:
    """Returns how many connections that have proved nothing yet a listener keeps at once."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(4, min(_MOST, limit // _SHARE))


@dataclass(frozen=True, slots=True)
class Claim:
    """Whom a connection belongs to."""

    group: str
    epoch: int
    rank: int
    """The connecting rank."""
    link: int

    def pack(self) -> bytes:
        return json.dumps([self.group, self.epoch, self.rank, self.link]).encode()

    @classmethod
    def unpack(cls, data: bytes) -> Claim:
        """Raises AuthError for anything else."""
        try:
            group, epoch, rank, link = json.loads(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise AuthError(f"a claim that is no claim: {error}") from None
        if not (isinstance(group, str) and all(type(v) is int and v >= 0 for v in (epoch, rank, link))):
            raise AuthError("a claim with fields of wrong types")
        return cls(group, epoch, rank, link)


class _Handshake:
    """One accepted connection before it has proved anything."""

    def __init__(self, sock: socket.socket, secret: bytes) -> None:
        self.sock, self.acceptor = sock, Acceptor(secret)
        self.until = time.monotonic() + HANDSHAKE_SECONDS
        self._data = b""
        sock.setblocking(False)
        sock.sendall(self.acceptor.hello)  # a fresh connection's buffer has room

    def advance(self) -> Claim | None:
        """Reads what is there; the claim once it is proved. Raises AuthError and OSError."""
        want = self._want() - len(self._data)
        got = self.sock.recv(want)
        if not got:
            raise AuthError("the connection ended within the handshake")
        self._data += got
        if len(self._data) < ANSWER_HEAD or len(self._data) < self._want():
            return None
        claim, proof = self.acceptor.check(self._data[:ANSWER_HEAD], self._data[ANSWER_HEAD:])
        self.sock.sendall(proof)
        return Claim.unpack(claim)

    def _want(self) -> int:
        if len(self._data) < ANSWER_HEAD:
            return ANSWER_HEAD
        return ANSWER_HEAD + self.acceptor.rest(self._data[:ANSWER_HEAD])


class Listener:
    """Accepts in a thread of its own until `close`. `addresses`: where peers reach this process, (host, port) each."""

    def __init__(self, secret: bytes, hosts: Sequence[str] = ("127.0.0.1",)) -> None:
        """Opens one socket per host address of this machine, on a free port.

        Raises OSError when an address cannot be bound.
        """
        self._secret, self._most = secret, most_handshakes()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._ready: dict[tuple[str, int], dict[tuple[int, int], socket.socket]] = {}
        self._floor: dict[str, int] = {}
        self._heard: dict[tuple[str, int], Callable[[], None]] = {}
        self.counts: Counter[str] = Counter()
        """Connections by what became of them: accepted, foreign, stale."""
        self._sockets = [socket.create_server((host, 0), backlog=256) for host in hosts]
        self.addresses: tuple[tuple[str, int], ...] = tuple(s.getsockname()[:2] for s in self._sockets)
        self._wake, self._woken = socket.socketpair()
        for sock in (*self._sockets, self._woken):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="heteromesh-listener", daemon=True)
        self._thread.start()

    def expect(self, group: str, epoch: int, heard: Callable[[], None]) -> None:
        """Calls `heard` (in the listener's thread; must not block) for each connection of an epoch; drops old ones."""
        with self._lock:
            self._floor[group] = max(epoch, self._floor.get(group, 0))
            for key in [k for k in self._ready if k[0] == group and k[1] < epoch]:
                self._drop(self._ready.pop(key))
            self._heard = {k: v for k, v in self._heard.items() if k[0] != group}
            self._heard[group, epoch] = heard

    def take(self, group: str, epoch: int) -> dict[tuple[int, int], socket.socket]:
        """Returns the connections that have come for this epoch since the last call, by (rank, link)."""
        with self._lock:
            return self._ready.pop((group, epoch), {})

    def close(self) -> None:
        """Ends the thread and closes every connection that nobody took."""
        self._wake.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            with self._lock:
                for waiting in self._ready.values():
                    self._drop(waiting)
                self._ready.clear()

    def _turn(self) -> bool:
        pending = bool(self._handshakes())
        for key, _ in self._selector.select(1.0 if pending else None):
            if key.fileobj is self._woken:
                return False
            if key.data is None:
                self._accept(key.fileobj)  # type: ignore[arg-type]
            elif key.data.sock.fileno() >= 0:  # not refused in this turn
                self._advance(key.data)
        if pending:
            self._expire()
        return True

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_PAUSE)  # it would be ready again at once
            return
        waiting = self._handshakes()
        if len(waiting) >= self._most:
            # the one that has waited for longest: a flood of silent ones must not keep others out
            oldest = min(waiting, key=lambda one: one.until)
            self._selector.unregister(oldest.sock)
            self._refuse(oldest.sock)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ, _Handshake(sock, self._secret))
        except OSError:
            self._refuse(sock)

    def _advance(self, handshake: _Handshake) -> None:
        try:
            claim = handshake.advance()
        except BlockingIOError:
            return
        except OSError:
            self._selector.unregister(handshake.sock)
            self._refuse(handshake.sock)
            return
        if claim is not None:
            self._selector.unregister(handshake.sock)
            self._file(claim, handshake.sock)

    def _file(self, claim: Claim, sock: socket.socket) -> None:
        key = (claim.group, claim.epoch)
        with self._lock:
            if claim.epoch < self._floor.get(claim.group, 0):
                self.counts["stale"] += 1
                sock.close()
                return
            self.counts["accepted"] += 1
            old = self._ready.setdefault(key, {}).pop((claim.rank, claim.link), None)
            if old is not None:
                old.close()
            self._ready[key][claim.rank, claim.link] = sock
            heard = self._heard.get(key)
            if heard is not None:
                heard()  # with the lock: nobody is called after `expect` has replaced it

    def _expire(self) -> None:
        now = time.monotonic()
        for handshake in self._handshakes():
            if handshake.until < now:
                self._selector.unregister(handshake.sock)
                self._refuse(handshake.sock)

    def _handshakes(self) -> list[_Handshake]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _refuse(self, sock: socket.socket) -> None:
        self.counts["foreign"] += 1
        sock.close()

    @staticmethod
    def _drop(waiting: dict[tuple[int, int], socket.socket]) -> None:
        for sock in waiting.values():
            sock.close()
