"""Looks for the coordinator at several addresses at once: none that is dead, blocked or hung holds up the others."""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from heteromesh.comm.tcp.auth import AuthError, Connector, HandshakeEnded

Address = tuple[str, int]
_PAUSE = 0.02
_SETTLE = 0.01
"""Seconds that an earlier address which accepts connections has to answer before a later one is taken."""


class _Dial:
    """One connection in the making."""

    def __init__(self, family: int, address: Any, secret: bytes) -> None:
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.connected = False
        self._connector = Connector(secret, b"member")
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with suppress(BlockingIOError):
                self.sock.connect(address)
        except BaseException:
            self.sock.close()
            raise

    @property
    def waits_for(self) -> int:
        return select.EPOLLIN if self.connected else select.EPOLLOUT

    def advance(self) -> bytes:
        """Goes on after an event; returns the session's key when the other end has proved itself. Raises OSError."""
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        if not self.connected:
            if self.sock.getsockname() == self.sock.getpeername():
                # a free port of this machine that the system chose for this end, too
                raise ConnectionRefusedError("nobody listens")
            self.connected = True
            return b""
        try:
            return self._connector.session if self._connector.advance(self.sock) else b""
        except HandshakeEnded as error:
            raise AuthError(f"{error}: the secrets differ, or it is no coordinator") from None


class Search:
    """A context manager. `look` as often as wanted."""

    def __init__(self, addresses: Sequence[Address], secret: bytes, *, pause: float = _PAUSE) -> None:
        """`pause`: seconds after which a failed address is tried again."""
        self._pause = pause
        self._addresses, self._secret = addresses, secret
        self._dials: dict[int, _Dial] = {}
        self._names: dict[int, tuple[int, Any]] = {}
        self._due = dict.fromkeys(range(len(addresses)), 0.0)
        self.wrong: dict[int, OSError] = {}
        """By address's index: why it was not the coordinator when it was last tried."""

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        for dial in self._dials.values():
            dial.sock.close()
        self._dials.clear()

    def look(self, seconds: float) -> tuple[socket.socket, bytes] | None:
        """Finds a blocking socket to one that knows the secret, and the session's key; None: none is found so soon, or
        nothing is left to be tried.

        Of several the first in the order of the addresses is taken, so that members find the same candidate.
        """
        until = time.monotonic() + seconds
        found: dict[int, bytes] = {}
        while True:
            self._start()
            rivals = [i for i, dial in self._dials.items() if dial.connected and i < min(found, default=0)]
            now = time.monotonic()
            if found and (not rivals or now >= until):
                return self._take(min(found), found)
            if now >= until or (not self._dials and self._pause == math.inf):
                return None
            self._turn(min(until - now, _PAUSE), found)
            if len(found) == 1:
                until = min(until, time.monotonic() + _SETTLE)

    def failed(self) -> str:
        """Returns what was wrong with each address."""
        told = []
        for index, (host, port) in enumerate(self._addresses):
            error = self.wrong.get(index)
            told.append(f"{host}:{port} ({'no answer' if error is None else error or type(error).__name__})")
        return ", ".join(told)

    def _start(self) -> None:
        now = time.monotonic()
        for index, address in enumerate(self._addresses):
            if index not in self._dials and now >= self._due[index]:
                try:
                    if index not in self._names:
                        family, _, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
                        self._names[index] = family, where
                    self._dials[index] = _Dial(*self._names[index], self._secret)
                except OSError as error:
                    self._fail(index, error)

    def _turn(self, seconds: float, found: dict[int, bytes]) -> None:
        poll = select.poll()
        of = {}
        for index, dial in self._dials.items():
            if index not in found:
                poll.register(dial.sock, dial.waits_for)
                of[dial.sock.fileno()] = index
        for descriptor, _ in poll.poll(max(1, int(seconds * 1000))):
            index = of[descriptor]
            try:
                session = self._dials[index].advance()
            except BlockingIOError:
                continue
            except OSError as error:
                self._dials.pop(index).sock.close()
                self._fail(index, error)
                continue
            if session:
                found[index] = session

    def _fail(self, index: int, error: OSError) -> None:
        self.wrong[index] = error
        self._due[index] = time.monotonic() + self._pause

    def _take(self, index: int, found: dict[int, bytes]) -> tuple[socket.socket, bytes]:
        sock = self._dials.pop(index).sock
        self._due[index] = time.monotonic() + self._pause
        for other in found:
            if other != index:
                self._dials.pop(other).sock.close()
        sock.setblocking(True)
        return sock, found[index]
