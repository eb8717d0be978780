"""Frames of the TCP data plane: a fixed header, then a piece of one message's bytes.

A message may be cut into pieces that travel on several connections: every header says which bytes these are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

_HEADER = struct.Struct("!IIqIIQQQ32s")
HEADER = _HEADER.size
_MAGIC = 0x484D4658
_WORD = (1 << 64) - 1


class FrameError(ConnectionError):
    """Bytes that are no frame of this epoch, or not what was agreed on."""


class SizeMismatch(FrameError):
    """A message of another size than its receive: the two ranks are not at the same point of what they do."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of a message."""

    epoch: int
    tag: int
    sequence: int
    """The n-th message with this tag between these two ranks."""
    offset: int
    size: int
    """Bytes of this piece."""
    total: int
    """Bytes of the message."""
    check: int
    """checksum() of the piece; 0 when the message is not checked."""
    mask: int
    """Whose contributions the message contains, bit i for rank i; 0 where that has no meaning."""

    def pack(self) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            self.epoch,
            self.tag,
            self.sequence,
            self.size,
            self.offset,
            self.total,
            self.check,
            self.mask.to_bytes(32, "big"),
        )


def unpack(header: bytes | bytearray, epoch: int) -> Frame:
    """Reads a header. Raises FrameError for foreign bytes, another epoch and impossible sizes."""
    magic, its_epoch, tag, sequence, size, offset, total, check, mask = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise FrameError("bytes that are no frame")
    if its_epoch != epoch:
        raise FrameError(f"a frame of epoch {its_epoch} in epoch {epoch}")
    if not size or offset + size > total:
        raise FrameError(f"a piece of {size} bytes at {offset} of {total}")
    return Frame(its_epoch, tag, sequence, offset, size, total, check, int.from_bytes(mask, "big"))


def checksum(view: memoryview) -> int:
    """Sums the 8-byte words modulo 2**64 (and of the bytes at the end); never 0, which means unchecked.

    Any single changed bit or byte changes it. It guards against accidents, not against attackers.
    """
    whole = len(view) & ~7
    total = int(np.add.reduce(np.frombuffer(view[:whole], np.int64))) if whole else 0
    if whole < len(view):
        total += int.from_bytes(view[whole:], "little")
    return (total & _WORD) or _WORD


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor of any dtype. Raises ValueError for others."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor must be contiguous to be sent or received, got strides {tensor.stride()}")
    if tensor.device.type != "cpu":
        raise ValueError(f"the TCP data plane moves CPU tensors, got one on {tensor.device}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
