"""State on its way between ranks, over a transport of the TCP data plane.

A state is whatever nests of dicts, lists, tuples, numbers and strings with CPU tensors in it say all that a member must
know (parameters, optimizer state, schedule, data position). The receiver needs no room of the right shape beforehand.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from heteromesh.comm.codec import PlainUnpickler
from heteromesh.comm.interfaces import Work
from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.collectives import wait_all
from heteromesh.comm.tcp.frame import bytes_of
from heteromesh.comm.tcp.transport import TcpTransport


def digest_of(state: Any) -> str:
    """Returns a digest that is equal for equal states: members that start with the same one need no copy of it."""
    head, tensors = pack(state)
    told = hashlib.blake2b(head, digest_size=16)
    for tensor in tensors:
        if tensor.numel():
            told.update(bytes_of(tensor))
    return told.hexdigest()


def pack(state: Any) -> tuple[bytes, list[torch.Tensor]]:
    """Returns the state without its tensors, and its tensors (contiguous, each once)."""
    tensors: list[torch.Tensor] = []
    places: dict[int, int] = {}

    class Packer(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return None
            if id(value) not in places:
                places[id(value)] = len(tensors)
                tensors.append(value.detach().contiguous())
            return places[id(value)], tuple(value.shape), str(value.dtype).removeprefix("torch.")

    buffer = io.BytesIO()
    Packer(buffer, protocol=5).dump(state)
    return buffer.getvalue(), tensors


def unpack(head: bytes) -> tuple[Any, list[torch.Tensor]]:
    """Returns the state with room in place of its tensors, and that room in order. Raises pickle.UnpicklingError."""
    rooms: dict[int, torch.Tensor] = {}

    class Unpacker(PlainUnpickler):
        def persistent_load(self, place: Any) -> torch.Tensor:
            index, shape, dtype = place
            if index not in rooms:
                rooms[index] = torch.empty(shape, dtype=getattr(torch, dtype))
            return rooms[index]

    state = Unpacker(io.BytesIO(head)).load()
    return state, [rooms[i] for i in range(len(rooms))]


def send_state(transport: TcpTransport, rank: int, head: bytes, tensors: Sequence[torch.Tensor]) -> list[Work]:
    """Starts to send what `pack` gave; the other rank calls `receive_state`."""
    body = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    works: list[Work] = [transport.send(rank, torch.tensor([len(head)]), Tag.STATE)]
    for tensor in (body, *tensors):
        if tensor.numel():
            works.append(transport.send_bytes(rank, bytes_of(tensor), Tag.STATE, checked=True, keep=tensor))
    return works


def receive_state(transport: TcpTransport, source: int) -> Any:
    """Receives a state that rank `source` sends. Raises GroupAborted."""
    size = torch.empty(1, dtype=torch.int64)
    transport.recv(source, size, Tag.STATE).wait()
    head = torch.empty(int(size), dtype=torch.uint8)
    transport.recv(source, head, Tag.STATE).wait()
    try:
        state, rooms = unpack(head.numpy().tobytes())
    except (pickle.UnpicklingError, TypeError, ValueError, AttributeError, EOFError) as reason:
        error = GroupAborted(f"rank {source}'s state can't be read: {reason}")
        transport.abort.set(error)
        raise error from None
    wait_all([transport.recv(source, room, Tag.STATE) for room in rooms if room.numel()])
    return state
