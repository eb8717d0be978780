"""One step's work: what each task of a subgroup does with slabs, buffers, gradients and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from heteromesh.parallel.state.offload.host_update import AdamOptions, HostUpdate, SegmentUpdate, State, TorchUpdate
from heteromesh.parallel.state.offload.layout import ParameterSlice
from heteromesh.parallel.state.offload.subgroups import Subgroups
from heteromesh.planner.ownership.offload_tasks import LaneTask


class StepWork:
    """Does the tasks of steps; gradients and hyperparameters are given to it before each."""

    def __init__(self, subgroups: Subgroups, update: HostUpdate, threads: int, *, poison: bool = False) -> None:
        """poison: fill buffers with NaN as soon as they are free, so that a use too late can't go unseen."""
        plan = subgroups.plan
        staged = max((s.numel for s in plan.subgroups if s.tier == "staged"), default=0)
        updated = max((s.numel for s in plan.subgroups if s.tier in ("host", "disk")), default=0) if plan.apart else 0
        self._subgroups, self._update, self._threads, self._poison = subgroups, update, threads, poison
        self.staging = [
            torch.empty(subgroups.rows * staged, device=subgroups.device) for _ in range(plan.staging if staged else 0)
        ]
        """What staged subgroups pass through on the device."""
        count = plan.weights if updated else 0
        self._gradient_buffers = [subgroups.host_memory(updated) for _ in range(count)]
        self._weight_buffers = [subgroups.host_memory(updated) for _ in range(count)]
        self._early: dict[int, torch.Tensor] = {}
        """By subgroup, gradients that were sent before the step."""
        self._sent: dict[int, tuple[torch.Tensor, int]] = {}
        """By parameter, the gradient that was sent, and its version."""
        self._gradients: Mapping[int, torch.Tensor] = {}
        self._options: Sequence[AdamOptions] = ()

    def begin(self, gradients: Mapping[int, torch.Tensor], options: Sequence[AdamOptions]) -> None:
        """Takes the next step's gradients (n,), of parameters that have one, and hyperparameters, of all."""
        self._gradients, self._options = gradients, options

    def send_early(self, index: int, parameter: torch.Tensor) -> None:
        """Starts to move a parameter's gradient to the host for the next step, as far as it is updated there."""
        if not self._subgroups.plan.apart or parameter.grad is None:
            return
        gradient = parameter.grad.detach().contiguous().view(-1)
        for number, segment in self._subgroups.places(index):
            if self._subgroups.plan.subgroups[number].tier in ("host", "disk"):
                if number not in self._early:
                    self._early[number] = self._subgroups.host_memory(self._subgroups.plan.subgroups[number].numel)
                target = _as(self._early[number], segment, gradient.dtype)
                self._subgroups.send(target, gradient[segment.of_parameter])
        self._sent[index] = parameter.grad, parameter.grad._version

    def end(self) -> None:
        """Drops what was given and sent for the step."""
        self._gradients = {}
        self._sent.clear()

    def __call__(self, task: LaneTask) -> None:
        """Does a task."""
        getattr(self, f"_{task.lane}")(task)

    def active(self, number: int) -> list[ParameterSlice]:
        """Returns what of a subgroup has gradients."""
        return [s for s in self._subgroups.segments[number] if s.parameter in self._gradients]

    def updates(self, number: int, rows: torch.Tensor) -> list[SegmentUpdate]:
        """Returns the updates of a subgroup in these rows, with gradients and weights where the parameters are."""
        return [
            SegmentUpdate(
                self._state(rows, segment),
                self._gradients[segment.parameter][segment.of_parameter],
                self._options[segment.parameter],
                segment.first,
                segment.of,
                self._weight(segment) if self._subgroups.has_masters else None,
            )
            for segment in self.active(number)
        ]

    def _gradients_out(self, task: LaneTask) -> None:
        for segment in self.active(task.subgroup):
            if self._is_early(segment):
                continue
            gradient = self._gradients[segment.parameter][segment.of_parameter]
            _as(self._gradient_buffers[_of(task)], segment, gradient.dtype).copy_(gradient, non_blocking=True)

    def _host(self, task: LaneTask) -> None:
        buffer = self._subgroups.slabs[task.subgroup] if task.ring is None else self._subgroups.ring[task.ring]
        updates = self.updates(task.subgroup, self._subgroups.slab(task.subgroup, buffer))
        if self._subgroups.plan.apart:
            for update, segment in zip(updates, self.active(task.subgroup), strict=True):
                source = self._early[task.subgroup] if self._is_early(segment) else self._gradient_buffers[_of(task)]
                update.gradient = _as(source, segment, update.gradient.dtype)
                update.weight = _as(self._weight_buffers[_of(task)], segment, self._weight(segment).dtype)
        self._update(updates, self._threads)

    def _weights_in(self, task: LaneTask) -> None:
        for segment in self.active(task.subgroup):
            weight = self._weight(segment)
            weight.copy_(_as(self._weight_buffers[_of(task)], segment, weight.dtype), non_blocking=True)
        self._release(self._gradient_buffers[_of(task)], self._weight_buffers[_of(task)])

    def _state_in(self, task: LaneTask) -> None:
        self._staged(task).copy_(self._subgroups.slab(task.subgroup), non_blocking=True)

    def _device(self, task: LaneTask) -> None:
        rows = self._subgroups.slab(task.subgroup) if task.buffer is None else self._staged(task)
        update = self._update if rows.device.type == "cpu" else TorchUpdate()
        update(self.updates(task.subgroup, rows), self._threads)

    def _state_out(self, task: LaneTask) -> None:
        self._subgroups.slab(task.subgroup).copy_(self._staged(task), non_blocking=True)
        self._release(self.staging[_of(task)])

    def _read(self, task: LaneTask) -> None:
        self._subgroups.read_record(task.subgroup, self._subgroups.ring[_of(task)])

    def _write(self, task: LaneTask) -> None:
        self._subgroups.write_record(task.subgroup, self._subgroups.ring[_of(task)])
        self._release(self._subgroups.ring[_of(task)])

    def _is_early(self, segment: ParameterSlice) -> bool:
        sent, version = self._sent.get(segment.parameter, (None, 0))
        gradient = self._subgroups.parameters[segment.parameter].grad
        return sent is not None and sent is gradient and sent._version == version

    def _staged(self, task: LaneTask) -> torch.Tensor:
        return self._subgroups.slab(task.subgroup, self.staging[_of(task)])

    def _state(self, rows: torch.Tensor, segment: ParameterSlice) -> State:
        p = rows[0, segment.of_subgroup] if self._subgroups.has_masters else self._weight(segment)
        return p, rows[-2, segment.of_subgroup], rows[-1, segment.of_subgroup]

    def _weight(self, segment: ParameterSlice) -> torch.Tensor:
        return self._subgroups.weights(segment.parameter)[segment.of_parameter]

    def _release(self, *buffers: torch.Tensor) -> None:
        if self._poison:
            for buffer in buffers:
                buffer.fill_(math.nan)


def _of(task: LaneTask) -> int:
    assert task.buffer is not None
    return task.buffer


def _as(buffer: torch.Tensor, segment: ParameterSlice, dtype: torch.dtype) -> torch.Tensor:
    """Returns a segment's elements in a buffer of fp32, as memory of another dtype that is no wider."""
    return buffer[segment.of_subgroup].view(dtype)[: segment.numel]
