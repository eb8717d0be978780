"""State for members that don't hold it: from one member that does, over the epoch's own connections."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from heteromesh.comm.tcp import TcpTransport, TcpWork
from heteromesh.comm.tcp_abort import GroupAborted
from heteromesh.comm.tcp_collectives import wait_all
from heteromesh.comm.tcp_frame import bytes_of
from heteromesh.faults.view import View

_TAG = (1 << 16) + 16
_DIGEST = 16


def layout(tensors: Sequence[torch.Tensor]) -> bytes:
    """The same for lists of tensors that can be copied into each other."""
    text = ";".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest()


def heal(transport: TcpTransport, view: View, tensors: Sequence[torch.Tensor]) -> None:
    """Copies the source's `tensors` into those of every stale member, checked; the others return at once.

    Raises GroupAborted, also when the lists differ in shapes or dtypes; a receiver's tensors are undefined then.
    """
    source = view.source
    if source is None:
        raise GroupAborted("no member holds the state")
    if view.rank == source:
        works: list[TcpWork] = []
        for rank in _stale(view):
            works += _send(transport, rank, tensors)
        wait_all(works)
    elif view.members[view.rank] in view.stale:
        _receive(transport, source, tensors)


def _stale(view: View) -> list[int]:
    return [rank for rank, member in enumerate(view.members) if member in view.stale]


def _send(transport: TcpTransport, rank: int, tensors: Sequence[torch.Tensor]) -> list[TcpWork]:
    head = torch.frombuffer(bytearray(layout(tensors)), dtype=torch.uint8)
    works = [transport.send(rank, head, _TAG)]
    for tensor in tensors:
        if tensor.numel():
            works.append(transport.send_bytes(rank, bytes_of(tensor), _TAG, checked=True, keep=tensor))
    return works


def _receive(transport: TcpTransport, source: int, tensors: Sequence[torch.Tensor]) -> None:
    head = torch.empty(_DIGEST, dtype=torch.uint8)
    transport.recv(source, head, _TAG).wait()
    if bytes(head.tolist()) != layout(tensors):
        error = GroupAborted(f"rank {transport.rank}'s state has other shapes or dtypes than rank {source}'s")
        transport.abort.set(error)
        raise error
    wait_all([transport.recv(source, tensor, _TAG) for tensor in tensors if tensor.numel()])
