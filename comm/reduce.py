"""The gradient sum: buckets of gradients, each summed over all ranks as soon as the last backward has filled it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from heteromesh.comm.world import World


@dataclass(slots=True)
class _Bucket:
    flat: torch.Tensor
    parameters: list[torch.nn.Parameter]
    views: list[torch.Tensor]
    counts: torch.Tensor
    """The end of `flat`: on how many ranks each parameter got a gradient."""
    missing: int = 0
    work: Any = None
    launched_ns: int = 0


@dataclass(slots=True)
class GradientSum:
    """Sums gradients over the world while the last backward of a step still runs.

    Gradients live in flat buckets (views, no copies), filled in reverse parameter order as backward does. Every
    rank launches the buckets in the same order, whatever the order in which it fills them and however many passes
    it runs. With one rank nothing is bucketed and nothing is summed. A parameter that got no gradient on any rank has
    None afterwards, as it would in one process: each bucket carries a count for each of its parameters.
    """

    world: World
    bucket_bytes: int = 8 << 20
    _buckets: list[_Bucket] = field(default_factory=list)
    _home: dict[torch.nn.Parameter, _Bucket] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _touched: set[torch.nn.Parameter] = field(default_factory=set)
    _next: int = 0
    _armed: bool = False

    def attach(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Takes over the gradients of these parameters (those that require one)."""
        if self.world.size == 1:
            return
        members: list[torch.nn.Parameter] = []
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            if members and not self._fits(members, parameter):
                self._add_bucket(members)
                members = []
            members.append(parameter)
        if members:
            self._add_bucket(members)

    def detach(self) -> None:
        """Removes the hooks; the parameters keep their gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gradients of zero for the next step (None where there are no buckets)."""
        if not self._buckets:
            for parameter in parameters:
                parameter.grad = None
        self._touched.clear()
        for bucket in self._buckets:
            bucket.flat.zero_()
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view

    def arm(self) -> None:
        """The next backward of this rank is its last in this step: buckets leave as they fill."""
        self._armed, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing, bucket.work = len(bucket.parameters), None

    def finish(self) -> None:
        """Launches what is left (parameters without gradient in this pass) and waits for every sum."""
        self._armed = False
        while self._next < len(self._buckets):
            self._launch()
        for index, bucket in enumerate(self._buckets):
            bucket.work.wait()
            for parameter, count in zip(bucket.parameters, bucket.counts.tolist(), strict=True):
                if not count:
                    parameter.grad = None
            self.world.recorder.add(
                f"gradient sum {index}",
                "comm",
                bucket.launched_ns,
                time.time_ns() - bucket.launched_ns,
                2 * bucket.flat.nbytes * (self.world.size - 1) // self.world.size,
            )

    def _fits(self, members: list[torch.nn.Parameter], parameter: torch.nn.Parameter) -> bool:
        same = members[0].dtype == parameter.dtype and members[0].device == parameter.device
        return same and sum(p.nbytes for p in members) + parameter.nbytes <= self.bucket_bytes

    def _add_bucket(self, members: list[torch.nn.Parameter]) -> None:
        sizes = [p.numel() for p in members]
        flat = torch.zeros(sum(sizes) + len(members), dtype=members[0].dtype, device=members[0].device)
        *parts, counts = flat.split([*sizes, len(members)])
        bucket = _Bucket(flat, members, [part.view_as(p) for part, p in zip(parts, members, strict=True)], counts)
        self._buckets.append(bucket)
        for parameter in members:
            self._home[parameter] = bucket
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._arrived))

    def _arrived(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter)
        self._touched.add(parameter)
        if not self._armed:
            return
        self._home[parameter].missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        bucket.counts.copy_(torch.tensor([float(p in self._touched) for p in bucket.parameters]))
        bucket.launched_ns = time.time_ns()
        bucket.work = dist.all_reduce(bucket.flat, group=self.world.gradients, async_op=True)
        self._next += 1
