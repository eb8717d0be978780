"""Control messages as bytes: JSON objects, each sealed with the connection's own key and its place in the stream.

The key comes from the handshake of comm/tcp/auth.py and the place is counted, not sent: a message from another
connection, another direction, or the same one replayed, does not verify.
"""

from __future__ import annotations

import json
import struct
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from heteromesh.comm.tcp.auth import MAC, equal, mac
from heteromesh.faults.wire import messages
from heteromesh.faults.wire.messages import ControlMessage, Malformed

MAX_MESSAGE = 1 << 20
_SIZE = struct.Struct("!I")
_KINDS: dict[str, type[Any]] = {
    "join": messages.Join,
    "rejoin": messages.Rejoin,
    "hb": messages.Heartbeat,
    "vote": messages.Vote,
    "healed": messages.Healed,
    "fail": messages.LinkFailed,
    "dead": messages.MemberDied,
    "leave": messages.Leave,
    "over": messages.EndJob,
    "records": messages.OperationReport,
    "welcome": messages.Welcome,
    "refused": messages.Refused,
    "epoch": messages.NewEpoch,
    "commit": messages.CommitNotice,
    "short": messages.TooFew,
    "fenced": messages.Evicted,
    "stop": messages.JobStopped,
    "alive": messages.Alive,
}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}


class WireError(ConnectionError):
    """Bytes that no member of this job has sent in this place."""


def encode(message: ControlMessage) -> bytes:
    """Returns the message as a JSON object: its kind and its fields."""
    cls: Any = type(message)
    values = {name: _plain(getattr(message, name)) for name, _ in _fields(cls)}
    return json.dumps({"kind": _NAMES[cls], **values}, separators=(",", ":")).encode()


def decode(body: bytes) -> ControlMessage:
    """Returns the message, or Malformed. Raises WireError for what is no object with a kind."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise WireError("a message that is no JSON object with a kind")
    try:
        cls: Any = _KINDS[data["kind"]]
        given = {name: _value(hint, data[name]) for name, hint in _fields(cls) if name in data}
        message: ControlMessage = cls(**given)
    except (KeyError, TypeError, ValueError, OverflowError):
        return Malformed(data["kind"])
    return message


@cache
def _fields(cls: Any) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(cls)
    return tuple((f.name, hints[f.name]) for f in fields(cls))


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it; a dataclass as the list of its fields."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        cls: Any = type(value)
        return [_plain(getattr(value, name)) for name, _ in _fields(cls)]
    return value


def _value(hint: Any, data: Any) -> Any:
    """Returns JSON data as a value of this type. Raises TypeError and ValueError where it is none."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(data, list):
        inner = (args[0],) * len(data) if args[1:] == (...,) else args
        return tuple(_value(each, item) for each, item in zip(inner, data, strict=True))
    if origin is Mapping and isinstance(data, dict):
        number = args[0] is int
        return {int(key) if number else key: _value(args[1], item) for key, item in data.items()}
    if origin in (types.UnionType, Union):
        return None if data is None else _value(args[0], data)
    if is_dataclass(hint) and isinstance(data, list):
        cls: Any = hint
        return cls(**{name: _value(each, item) for (name, each), item in zip(_fields(cls), data, strict=True)})
    if hint is float and type(data) is int:
        return float(data)
    if type(data) is not hint:
        raise TypeError(f"{data!r} is no {hint}")
    return data


class Wire:
    """One connection's control messages in both directions; only bytes in and out."""

    def __init__(self, session: bytes, end: Literal["member", "coordinator"]) -> None:
        """`session`: the key that both ends have from the handshake. `end`: which end this is."""
        self._key = session
        self._out, self._in = (b"m", b"c") if end == "member" else (b"c", b"m")
        self._sent = self._received = 0
        self._data = bytearray()

    def pack(self, message: ControlMessage) -> bytes:
        """Returns the bytes to send; messages must be sent in the order in which they were packed."""
        return self.seal(encode(message))

    def seal(self, body: bytes) -> bytes:
        """Returns what `pack` does, of a message that is encoded already."""
        seal = mac(self._key, self._out, struct.pack("!Q", self._sent), body)
        self._sent += 1
        return _SIZE.pack(len(body)) + seal + body

    def feed(self, data: bytes) -> list[ControlMessage]:
        """Returns the messages that these bytes complete. Raises WireError; the connection is of no use then."""
        self._data += data
        complete = []
        while len(self._data) >= _SIZE.size:
            (size,) = _SIZE.unpack_from(self._data)
            if size > MAX_MESSAGE:
                raise WireError(f"a message of {size} bytes is longer than {MAX_MESSAGE}")
            if len(self._data) < _SIZE.size + MAC + size:
                break
            seal = bytes(self._data[_SIZE.size : _SIZE.size + MAC])
            body = bytes(self._data[_SIZE.size + MAC : _SIZE.size + MAC + size])
            del self._data[: _SIZE.size + MAC + size]
            complete.append(self._open(seal, body))
        return complete

    def _open(self, seal: bytes, body: bytes) -> ControlMessage:
        if not equal(seal, mac(self._key, self._in, struct.pack("!Q", self._received), body)):
            raise WireError("a message that is foreign, changed or out of its order")
        self._received += 1
        return decode(body)
