"""Atomic steps: all tensors of a step are summed over one set of members and committed by all of them, or by none.

A member sums into a copy, tells the coordinator the result's digest and waits. When every member of the epoch has told
the same, the step is committed and each applies it. When a member is lost first, the survivors sum the very same
gradients again in the next epoch: nothing is computed twice, nothing is applied twice, nobody decides alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.faults.member.group import EpochGroup
from heteromesh.faults.member.state_transfer import heal
from heteromesh.faults.membership.view import View

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class AtomicStep(Generic[T]):
    """A committed step and what its body returned in the attempt that was committed."""

    step: int
    view: View
    result: T
    digest: str
    attempts: int
    """1, and one more for each epoch that ended under this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A committed sum. The tensors are valid until the next `reduce`."""

    step: int
    epoch: int
    contributors: tuple[int, ...]
    """Members whose values are in every one of the sums."""
    names: tuple[str, ...]
    sums: list[torch.Tensor]
    digest: str
    attempts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Summation:
    """A sum that is not committed yet."""

    mask: int
    """Bit i: rank i's values are in every one of the sums."""
    sums: list[torch.Tensor]
    digest: str


def _nothing() -> Sequence[torch.Tensor]:
    return ()


class Steps:
    """One member's steps in one group. One thread owns it.

    Call `start` before the first forward: it brings a joining member to the job's state. Apply what `reduce` returns
    before the next call, which may hand the state to a member that joins.
    """

    def __init__(
        self,
        group: EpochGroup,
        state: Callable[[], Any] = _nothing,
        adopt: Callable[[Any], None] | None = None,
        *,
        step: int = 0,
    ) -> None:
        """`state()`: all that a joining member must have (parameters, optimizer state, schedule, data position: see
        comm/tcp/state_transfer.py); `adopt(state)` makes it this member's. Without `adopt`, `state()` is a list of
        tensors, of equal shapes and dtypes on all members, that are overwritten. `step`: steps behind that state."""
        self._group, self._state, self._adopt = group, state, adopt or self._overwrite
        self.step = step
        self._healed = -1
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def start(self) -> View:
        """Returns when this member holds the state after `step` steps. Raises Fenced and Stopped."""
        while True:
            try:
                return self._enter()
            except GroupAborted:
                continue

    def atomic(
        self, body: Callable[[EpochGroup], tuple[T, str]], overlap: Callable[[T], None] | None = None
    ) -> AtomicStep[T]:
        """Runs `body(group)` in one epoch and commits it; runs all of it again when the epoch ends first.

        `body` may call any collectives of the group, must not change its inputs, and returns a result and a digest
        that must be equal on all members. `overlap(result)` hides the round trip of the commit: work on the result
        that can be done again, should it not be committed. Raises Fenced and Stopped.
        """
        attempts = 0
        while True:
            attempts += 1
            try:
                view = self._enter()
                result, digest = body(self._group)
                self._group.vote(self.step, digest)
                if overlap is not None:
                    overlap(result)
                if not self._group.decision(self.step):
                    continue
            except GroupAborted:
                continue
            self.step += 1
            return AtomicStep(step=self.step - 1, view=view, result=result, digest=digest, attempts=attempts)

    def reduce(self, tensors: Sequence[torch.Tensor], *, contributes: bool = True) -> Commit:
        """Sums each tensor over the members; returns when that is committed, however many epochs it takes.

        The tensors (contiguous, on the CPU) are only read. A member that doesn't contribute takes part with zeros, for
        example in the step in which it joined. Raises Fenced and Stopped.
        """
        sources = self._pack(tensors)

        def body(group: EpochGroup) -> tuple[Summation, str]:
            summed = self._sum(group, sources, tensors, contributes)
            return summed, summed.digest

        done = self.atomic(body)
        members = done.view.contributors(done.result.mask)
        return Commit(
            step=done.step,
            epoch=done.view.epoch,
            contributors=members,
            names=tuple(done.view.names[done.view.members.index(m)] for m in members),
            sums=done.result.sums,
            digest=done.digest,
            attempts=done.attempts,
        )

    def sum(self, group: EpochGroup, tensors: Sequence[torch.Tensor]) -> Summation:
        """Sums each tensor over the members, for a body of `atomic`. The sums are valid until the next ones."""
        return self._sum(group, self._pack(tensors), tensors, True)

    def _enter(self) -> View:
        view = self._group.ready()
        if view.epoch != self._healed:
            mine = view.members[view.rank] in view.stale
            if view.stale:
                self._group.run(lambda transport: heal(transport, view, self._state, self._adopt))
            self._healed = view.epoch
            if mine:
                self.step = view.committed
                self._group.healed(self.step)
        return view

    def _overwrite(self, received: Sequence[torch.Tensor]) -> None:
        mine = list(self._state())
        if [(t.shape, t.dtype) for t in mine] != [(t.shape, t.dtype) for t in received]:
            raise GroupAborted("the received state has other shapes or dtypes than this member's")
        for tensor, values in zip(mine, received, strict=True):
            tensor.detach().copy_(values)

    def _sum(
        self,
        group: EpochGroup,
        sources: dict[torch.dtype, torch.Tensor],
        tensors: Sequence[torch.Tensor],
        contributes: bool,
    ) -> Summation:
        mask, text, targets = 0, "", {}
        for dtype, source in sources.items():
            target = targets[dtype] = self._buffer("out", dtype, source.numel())
            summed = group.all_reduce(source, target, contributes=contributes)
            mask, text = summed.mask, f"{text}|{dtype}:{summed.mask:x}:{summed.digest}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return Summation(mask=mask, sums=self._unpack(targets, tensors), digest=digest)

    def _pack(self, tensors: Sequence[torch.Tensor]) -> dict[torch.dtype, torch.Tensor]:
        """Packs one flat tensor for each dtype; a single tensor is taken as it is."""
        packed = {}
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t.detach() for t in tensors if t.dtype == dtype]
            if len(same) == 1 and same[0].is_contiguous():
                packed[dtype] = same[0].view(-1)
                continue
            flat = packed[dtype] = self._buffer("in", dtype, sum(t.numel() for t in same))
            torch.cat([t.reshape(-1) for t in same], out=flat)
        return packed

    @staticmethod
    def _unpack(packed: dict[torch.dtype, torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        at, sums = dict.fromkeys(packed, 0), []
        for tensor in tensors:
            start = at[tensor.dtype]
            at[tensor.dtype] = start + tensor.numel()
            sums.append(packed[tensor.dtype][start : start + tensor.numel()].view(tensor.shape))
        return sums

    def _buffer(self, way: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Keeps a buffer from step to step: fresh memory costs more than the sum of small tensors."""
        buffer = self._buffers.get((way, dtype))
        if buffer is None or buffer.numel() != count:
            buffer = self._buffers[way, dtype] = torch.empty(count, dtype=dtype)
        return buffer
