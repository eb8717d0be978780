"""Control messages: JSON objects, each sealed with the connection's own key and its place in the stream.

The key comes from the handshake of comm/tcp/auth.py and the place is counted, not sent: a message from another
connection, another direction, or the same one replayed, does not verify.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Literal

from heteromesh.comm.tcp.auth import MAC, equal, mac

Message = dict[str, Any]
"""Always with the key "kind"."""
MAX_MESSAGE = 1 << 20
_SIZE = struct.Struct("!I")


class WireError(ConnectionError):
    """Bytes that no member of this job has sent in this place."""


class Wire:
    """One connection's control messages in both directions; only bytes in and out."""

    def __init__(self, session: bytes, end: Literal["member", "coordinator"]) -> None:
        """`session`: the key that both ends have from the handshake. `end`: which end this is."""
        self._key = session
        self._out, self._in = (b"m", b"c") if end == "member" else (b"c", b"m")
        self._sent = self._received = 0
        self._data = bytearray()

    def pack(self, message: Message) -> bytes:
        """The bytes to send; messages must be sent in the order in which they were packed."""
        body = json.dumps(message, separators=(",", ":")).encode()
        seal = mac(self._key, self._out, struct.pack("!Q", self._sent), body)
        self._sent += 1
        return _SIZE.pack(len(body)) + seal + body

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete. Raises WireError; the connection is of no use then."""
        self._data += data
        messages = []
        while len(self._data) >= _SIZE.size:
            (size,) = _SIZE.unpack_from(self._data)
            if size > MAX_MESSAGE:
                raise WireError(f"a message of {size} bytes is longer than {MAX_MESSAGE}")
            if len(self._data) < _SIZE.size + MAC + size:
                break
            seal = bytes(self._data[_SIZE.size : _SIZE.size + MAC])
            body = bytes(self._data[_SIZE.size + MAC : _SIZE.size + MAC + size])
            del self._data[: _SIZE.size + MAC + size]
            messages.append(self._open(seal, body))
        return messages

    def _open(self, seal: bytes, body: bytes) -> Message:
        if not equal(seal, mac(self._key, self._in, struct.pack("!Q", self._received), body)):
            raise WireError("a message that is foreign, changed or out of its order")
        self._received += 1
        try:
            message = json.loads(body)
        except ValueError:
            message = None
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise WireError("a message that is no JSON object with a kind")
        return message
