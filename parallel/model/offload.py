"""Selective activation offload: part of what backward needs waits in host memory (ByteScale, arXiv 2502.21231, 4.3).

A pass with `offload(ratio)` around its forward keeps that share of its saved activations' bytes on the host, and so
fits more tokens on each of its ranks: the planner may give a long sequence to fewer of them. The values come back
bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True)
class OffloadCount:
    """What one forward has saved for its backward. A tensor that is saved several times counts once."""

    kept_bytes: int = 0
    """On the device."""
    moved_bytes: int = 0
    """In host memory."""
    returned_bytes: int = 0
    """Brought back so far."""


@dataclass(slots=True)
class _OnHost:
    copy: torch.Tensor
    device: torch.device
    ready: Any
    """Event after which the copy may be read; None off CUDA."""


@dataclass(frozen=True, slots=True)
class _Seen:
    memory: StorageWeakRef
    saved: _OnHost | torch.Tensor


@dataclass(slots=True)
class ActivationOffload:
    """Sends a share of the bytes that it is given to keep to host memory."""

    ratio: float
    smallest: int
    """Bytes below which a tensor stays."""
    kept: frozenset[int]
    """Addresses of memory that is never moved."""
    count: OffloadCount
    stream: Any
    """For copies; None off CUDA."""
    seen: dict[tuple[Any, ...], _Seen] = field(default_factory=dict)

    @classmethod
    def of(
        cls, ratio: float, parameters: Sequence[torch.Tensor], device: torch.device | None, smallest: int = 4096
    ) -> ActivationOffload:
        """Returns one for a pass; parameters: never moved. Raises ValueError for a ratio outside 0..1."""
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"offload ratio {ratio} is not between 0 (keep all) and 1 (move all)")
        kept = frozenset(p.untyped_storage().data_ptr() for p in parameters)
        stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
        return cls(ratio, smallest, kept, OffloadCount(), stream)

    def pack(self, tensor: torch.Tensor) -> _OnHost | torch.Tensor:
        """Moves the tensor while the share moved so far is below the ratio; large tensors only."""
        if tensor.nbytes < self.smallest or tensor.untyped_storage().data_ptr() in self.kept:
            return tensor
        memory = StorageWeakRef(tensor.untyped_storage())
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = self.seen.get((memory.cdata, view))
        # a tensor that was moved may be freed, and its address be another's by now
        if known is None or known.memory.expired():
            known = self.seen[memory.cdata, view] = _Seen(memory, self._place(tensor))
        return known.saved

    def unpack(self, saved: _OnHost | torch.Tensor) -> torch.Tensor:
        """Returns the saved values on their device."""
        if isinstance(saved, torch.Tensor):
            return saved
        self.count.returned_bytes += saved.copy.nbytes
        if saved.ready is None:
            return saved.copy.clone()
        torch.cuda.current_stream(saved.device).wait_event(saved.ready)
        return saved.copy.to(saved.device, non_blocking=True)

    def _place(self, tensor: torch.Tensor) -> _OnHost | torch.Tensor:
        total = self.count.kept_bytes + self.count.moved_bytes + tensor.nbytes
        if self.count.moved_bytes + tensor.nbytes > self.ratio * total:
            self.count.kept_bytes += tensor.nbytes
            return tensor
        self.count.moved_bytes += tensor.nbytes
        return self._to_host(tensor)

    def _to_host(self, tensor: torch.Tensor) -> _OnHost:
        cuda = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        if not cuda:
            copy.copy_(tensor)
            return _OnHost(copy, tensor.device, None)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            copy.copy_(tensor, non_blocking=True)
            # the allocator must not hand the memory out again before the copy has read it
            tensor.record_stream(self.stream)
            ready = torch.cuda.Event()
            ready.record(self.stream)
        return _OnHost(copy, tensor.device, ready)


@contextmanager
def offload(
    ratio: float, parameters: Sequence[torch.Tensor] = (), *, smallest: int = 4096, device: torch.device | None = None
) -> Iterator[OffloadCount]:
    """Sends `ratio` of the bytes that forward saves for backward to host memory within the block.

    parameters: never moved (autograd saves weights too). smallest: bytes below which a tensor stays. On CUDA copies
    run on a stream of their own into pinned memory; on the CPU it is a plain copy. Raises ValueError for a ratio
    outside 0..1.
    """
    state = ActivationOffload.of(ratio, parameters, device, smallest)
    with torch.autograd.graph.saved_tensors_hooks(state.pack, state.unpack):
        yield state.count
    state.seen.clear()
