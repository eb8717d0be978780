"""A member's control connection: blocking handshake, sealed messages from any thread, one thread that listens."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from heteromesh.comm.tcp.auth import AuthError
from heteromesh.faults.wire.codec import Wire, WireError
from heteromesh.faults.wire.discovery import Address as Address
from heteromesh.faults.wire.discovery import Search
from heteromesh.faults.wire.messages import ControlMessage, FromMember

TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)
_LOOK = 0.05
_REFUSALS = 3
"""Handshakes that end one after another before the secret counts as wrong."""


class Control:
    """Connected and authenticated; `send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket, session: bytes) -> None:
        self._sock, self._wire = sock, Wire(session, "member")
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def limit(self, silence: float) -> None:
        """Limits how many seconds nothing that was sent may stay unacknowledged; 0: the system's."""
        # the system counts from the first time that it repeats a packet, which comes about 0.2 s after the packet
        counted = max(silence - 0.2, silence * 0.6)
        self._sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(counted * 1000))

    def ask(self, message: FromMember, *, seconds: float) -> list[ControlMessage]:
        """Sends the first message; what comes, the answer to it first. Raises OSError and is closed then."""
        try:
            self._sock.settimeout(seconds)
            self.send(message)
            answers: list[ControlMessage] = []
            while not answers:
                answers = self.receive()
            self._sock.settimeout(None)
            return answers
        except OSError:
            self.close()
            raise

    def send(self, message: FromMember) -> None:
        """Raises OSError when the connection is gone."""
        with self._lock:
            self._sock.sendall(self._wire.pack(message))

    def receive(self) -> list[ControlMessage]:
        """Returns what has come; call when readable. Raises OSError at the end of the connection."""
        data = self._sock.recv(1 << 16)
        if not data:
            raise WireError("the coordinator closed the connection")
        return self._wire.feed(data)

    def close(self) -> None:
        # a shutdown, so that a thread that listens or sends comes back before the descriptor is gone
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._sock.close()


def connect(addresses: Sequence[Address], secret: bytes, *, seconds: float, silence: float = 0.0) -> Control:
    """Connects to the coordinator at any of these addresses; all are tried at once. `silence`: for `Control.limit`.

    Raises ConnectionError that names every address and what was wrong with it when all have failed, or after `seconds`;
    it is an AuthError when one ended the handshake.
    """
    until = time.monotonic() + seconds
    with Search(addresses, secret, pause=math.inf) as search:
        while True:
            found = search.look(min(_LOOK, max(0.0, until - time.monotonic())))
            if found is not None:
                control = Control(*found)
                control.limit(silence)
                return control
            if len(search.wrong) == len(addresses) or time.monotonic() >= until:
                foreign = any(isinstance(error, AuthError) for error in search.wrong.values())
                what = f"{socket.gethostname()} reaches no coordinator at {search.failed()}"
                raise AuthError(what) if foreign else ConnectionError(what)


def enrol(
    addresses: Sequence[Address], secret: bytes, join: FromMember, *, seconds: float
) -> tuple[Control, list[ControlMessage]]:
    """Joins; returns the connection, and what the coordinator has said, its answer first.

    Tries for `seconds`: the coordinator may be about to start, or to be elected. Raises ConnectionError.
    """
    until = time.monotonic() + seconds
    refusals = 0
    while True:
        try:
            control = connect(addresses, secret, seconds=max(_LOOK, until - time.monotonic()))
            return control, control.ask(join, seconds=max(_LOOK, until - time.monotonic()))
        except OSError as error:
            # a candidate that gives up ends handshakes too, but not again and again
            refusals = refusals + 1 if isinstance(error, AuthError) else 0
            if refusals >= (_REFUSALS if len(addresses) > 1 else 1) or time.monotonic() >= until:
                raise
        time.sleep(_LOOK)
