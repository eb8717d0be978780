"""One pipeline stage at work: torch's PipelineStage with micro-batches that each have their own number of tokens.

torch.distributed.pipelining gives all micro-batches one shape. Here a buffer is made when its message is expected, in
the size of that micro-batch, and goes when its backward is done: no position is padded, and a stage holds no more
buffers than 1F1B has micro-batches in flight. Overridden are only the methods that a schedule calls: the messages of a
micro-batch, its forward and its backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from heteromesh.comm.records import Recorder
from heteromesh.comm.replicas import PipelineGroups
from heteromesh.parallel.attention.api import PassContext
from heteromesh.parallel.model.call import ModelCall
from heteromesh.parallel.model.draws import TokenPlaces
from heteromesh.parallel.model.recompute import known_in_backward
from heteromesh.parallel.model.rotary import follow_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A pack of whole sequences on its way through the stages; tensors (1, n) on the stage's device."""

    context: PassContext
    places: TokenPlaces
    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor

    @property
    def size(self) -> int:
        """Counts the tokens."""
        return self.context.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """What travels between stages: hidden states (1, n, hidden)."""

    hidden: int
    dtype: torch.dtype


class StageModule(nn.Module):
    """A cut model as torch's pipelining calls it: hidden states out, or per-token losses (n,) on the last stage."""

    def __init__(self, model: nn.Module, last: bool, boundary: Boundary, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self._last, self._boundary, self._autocast = last, boundary, autocast
        self._call = ModelCall(model)
        follow_lengths(model)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x: tokens (1, n) on the first stage, else hidden states (1, n, hidden); positions and labels (1, n)."""
        with torch.autocast(x.device.type, self._autocast) if self._autocast else nullcontext():
            if self._last:
                return self._call.losses(x, positions, labels)
            return self._call.output(x, positions).to(self._boundary.dtype).contiguous()


class MicroBatchWork:
    """What a stage does with the micro-batches of a step: forwards, backwards, and how long they took."""

    def __init__(
        self,
        batches: Sequence[MicroBatch],
        recorder: Recorder,
        before_last_backward: Callable[[], None],
        drawing: Callable[[MicroBatch], AbstractContextManager[None]],
    ) -> None:
        """drawing: a context for forwards of a micro-batch, in which random numbers are its own."""
        self.batches = batches
        self.losses: dict[int, torch.Tensor] = {}
        """On the last stage, by micro-batch: per-token losses (n,), detached."""
        self.outputs: dict[int, torch.Tensor] = {}
        """By micro-batch between its forward and its backward: what backward begins with."""
        self.seconds = [0.0] * len(batches)
        """By micro-batch, in its forward and backward, without waiting for other stages; by the host's clock."""
        self._recorder, self._before_last_backward, self._drawing = recorder, before_last_backward, drawing

    def has(self, index: int) -> bool:
        """Whether there is such a micro-batch: a schedule needs as many as stages, and the rest are nothing."""
        return index < len(self.batches)

    @contextmanager
    def forward(self, index: int) -> Iterator[MicroBatch]:
        """Times a forward, which attends as its micro-batch says."""
        batch = self.batches[index]
        with self._timed(index, "forward"), batch.context.active(), self._drawing(batch):
            yield batch

    @contextmanager
    def backward(self, index: int) -> Iterator[None]:
        """Times a backward, which knows its micro-batch where layers are computed again."""
        if index == len(self.batches) - 1:
            self._before_last_backward()
        batch, output = self.batches[index], self.outputs.pop(index)
        with (
            self._timed(index, "backward"),
            batch.context.active(),
            self._drawing(batch),
            known_in_backward(output),
        ):
            yield

    @contextmanager
    def _timed(self, index: int, what: str) -> Iterator[None]:
        start = time.perf_counter()
        with self._recorder.span(f"{what} {index}", "pass"):
            yield
        self.seconds[index] += time.perf_counter() - start


class PackStage(PipelineStage):
    """A PipelineStage that is told its micro-batches before each step."""

    def __init__(self, module: StageModule, groups: PipelineGroups, device: torch.device, boundary: Boundary) -> None:
        """boundary: between this stage and its neighbours."""
        hidden = torch.empty(1, 0, boundary.hidden, dtype=boundary.dtype, device=device, requires_grad=True)
        first, last = groups.stage == 0, groups.stage == len(groups.chain) - 1
        # examples without tokens: torch then asks no neighbour for shapes, and what it allocates from them is empty
        super().__init__(
            module,
            groups.stage,
            len(groups.chain),
            device,
            input_args=torch.empty(1, 0, dtype=torch.long, device=device) if first else hidden,
            output_args=torch.empty(0, device=device, requires_grad=True) if last else hidden,
            group=groups.chain_group,
        )
        self.stage_index_to_group_rank = groups.chain_members()
        # under TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares every micro-batch with the examples
        self._runtime_validate = False
        self._boundary = boundary
        self.work: MicroBatchWork | None = None

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives the hidden states of a micro-batch."""
        if self.is_first or not self._has(fwd_chunk_id):
            return []
        self.args_recv_info[fwd_chunk_id][0].buffer = self._buffer(fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return super().get_fwd_send_ops(fwd_chunk_id) if self._has(fwd_chunk_id) else []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives the gradient of what was sent on."""
        if self.is_last or not self._has(bwd_chunk_id):
            return []
        self.grad_recv_info[bwd_chunk_id][0].buffer = self._buffer(bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends the gradient of what was received."""
        return super().get_bwd_send_ops(bwd_chunk_id) if self._has(bwd_chunk_id) else []

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Runs forward of a micro-batch; None where there is none."""
        if not self._has(fwd_chunk_id):
            return None
        assert self.work
        with self.work.forward(fwd_chunk_id) as batch:
            inputs = {"positions": batch.positions, "labels": batch.labels}
            output = super().forward_one_chunk(
                fwd_chunk_id, (batch.tokens,) if self.is_first else (), inputs, save_forward_output
            )
        self.work.outputs[fwd_chunk_id] = output
        if self.is_last:
            self.work.losses[fwd_chunk_id] = output.detach()
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Runs backward of a micro-batch; its buffers go."""
        if not self._has(bwd_chunk_id):
            return
        assert self.work
        with self.work.backward(bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        for info in (self.args_recv_info, self.grad_recv_info):
            for entry in info[bwd_chunk_id]:
                entry.buffer = None

    def _has(self, index: int) -> bool:
        assert self.work, "a step's work must be set before the schedule runs"
        return self.work.has(index)

    def _buffer(self, index: int) -> torch.Tensor:
        assert self.work
        size = self.work.batches[index].size
        return torch.empty(1, size, self._boundary.hidden, dtype=self._boundary.dtype, device=self.device)
