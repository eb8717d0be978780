"""A member's control connection: blocking handshake, sealed messages from any thread, one thread that listens."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress

from heteromesh.comm.tcp_auth import HELLO, MAC, AuthError, Connector
from heteromesh.faults.wire import Message, Wire, WireError

TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)
Address = tuple[str, int]


class Control:
    """Connected and authenticated; `send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket, session: bytes) -> None:
        self._sock, self._wire = sock, Wire(session, "member")
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """Raises OSError when the connection is gone."""
        with self._lock:
            self._sock.sendall(self._wire.pack(message))

    def receive(self) -> list[Message]:
        """What has come; call when readable. Raises OSError at the end of the connection."""
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


def connect(addresses: Sequence[Address], secret: bytes, *, seconds: float, silence: float) -> Control:
    """The first of these coordinators that answers and knows the secret.

    `silence`: seconds without acknowledgement after which the connection counts as lost. Raises ConnectionError that
    names every address and what was wrong with it.
    """
    wrong = []
    for address in addresses:
        try:
            sock = socket.create_connection(address, timeout=seconds)
        except OSError as error:
            wrong.append(f"{address[0]}:{address[1]} ({error})")
            continue
        try:
            return _prove(sock, secret, silence)
        except OSError as error:
            sock.close()
            wrong.append(f"{address[0]}:{address[1]} ({error or type(error).__name__})")
    raise ConnectionError(f"no coordinator at {', '.join(wrong)}")


def _prove(sock: socket.socket, secret: bytes, silence: float) -> Control:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, max(1, int(silence * 1000)))
    connector = Connector(secret, b"member")
    sock.sendall(connector.answer(_exactly(sock, HELLO)))
    try:
        connector.check(_exactly(sock, MAC))
    except EOFError:
        raise AuthError("refused: this process's secret is not the job's") from None
    sock.settimeout(None)
    return Control(sock, connector.session)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise AuthError("the connection ended within the handshake: the secrets differ, or it is no coordinator")
        data += more
    return data
