"""Lanes of a CUDA device: a stream for each direction of the link and for updates, threads for the host and the disk.

Not yet run on a GPU. Each lane has a thread that gives its work to the lane's stream. Between streams events are waited
for on the device, by threads of the host only where they need the bytes themselves; the device is never synchronised.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch

from heteromesh.errors import UserError
from heteromesh.parallel.state.offload.lanes import ThreadLanes, Work
from heteromesh.planner.ownership.offload import OffloadPlan
from heteromesh.planner.ownership.offload_tasks import Lane, LaneTask

_STREAMS: tuple[Lane, ...] = ("gradients_out", "state_in", "weights_in", "state_out", "device")
_READ_BY_MODEL: tuple[Lane, ...] = ("gradients_out", "weights_in", "device")
"""What the caller's stream must wait for: gradients may be dropped then, and weights used. The flush may trail."""


class CudaLanes(ThreadLanes):
    """Streams of one device, made once, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[Lane, Any] = {lane: torch.cuda.Stream(device) for lane in _STREAMS}
        self._last: list[Any] = []
        """Events of the last step's tasks."""

    def run(self, plan: OffloadPlan, tasks: Sequence[LaneTask], work: Work) -> None:
        caller = torch.cuda.current_stream(self._device)
        # gradients are ready when the caller's stream has come here; slabs and buffers when the last step is through
        for stream in self._streams.values():
            stream.wait_stream(caller)
            for event in self._last:
                stream.wait_event(event)
        if any(task.lane in ("host", "read", "write") for task in tasks):
            self.settle()
            if not any(task.lane == "gradients_out" for task in tasks):
                caller.synchronize()  # the host reads gradients where they are
        self._events: dict[int, Any] = {}
        try:
            super().run(plan, tasks, work)
        finally:
            self._last = list(self._events.values())
        for number, event in self._events.items():
            if tasks[number].lane in _READ_BY_MODEL:
                caller.wait_event(event)

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        stream, caller = self._streams["gradients_out"], torch.cuda.current_stream(self._device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            source.record_stream(stream)  # it may be dropped before it has been read
            sent = torch.cuda.Event()
            sent.record(stream)
        self._last.append(sent)

    def settle(self) -> None:
        for event in self._last:
            event.synchronize()

    def memory(self, numel: int) -> torch.Tensor:
        """Returns pinned zeros, of exactly this size: torch's own pinned memory is rounded up to a power of two.

        Raises UserError where the system doesn't let so much be pinned.
        """
        memory = _Pinned(-1, max(1, numel) * 4)
        flat = torch.frombuffer(memory, dtype=torch.float32)
        if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) != 0:
            raise UserError(
                f"{flat.nbytes / 1e9:.3f} GB of host memory can't be pinned for {self._device}: raise the limit of "
                "locked memory (ulimit -l), or give the host tier less"
            )
        memory.address = flat.data_ptr()
        return flat[:numel]

    def _perform(self, tasks: Sequence[LaneTask], work: Work) -> Callable[[int], None]:
        def perform(number: int) -> None:
            task = tasks[number]
            waited = [self._events[i] for i in task.after if i in self._events]
            stream = self._streams.get(task.lane)
            if stream is None:
                for event in waited:
                    event.synchronize()
                work(task)
                return
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                for event in waited:
                    stream.wait_event(event)
                work(task)
                ended = torch.cuda.Event()
                ended.record(stream)
            self._events[number] = ended

        return perform


class _Pinned(mmap.mmap):
    """Anonymous memory that is unpinned before it is given back, which is when the last tensor in it is gone."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.address)
