"""Buffers that passes change (tokens seen, load of experts), the same on all ranks after every step.

Each rank's passes change its own copy. The rule, found out by two equal passes before the first step: a buffer to which
the second pass adds what the first one added is a sum, so all ranks' additions are added up, as one process that had
made all passes would have them; any other buffer that passes change (a moving average, a cache) becomes that of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from heteromesh.parallel.model.undisturbed import undisturbed

Changes = Mapping[str, Any]
"""By name, numbers: what was added to a sum, or on rank 0 the values of other buffers."""
_RELATIVE = 1e-5
"""Within which two additions are equal: a moving average's differ by its momentum."""


class PassBuffers:
    """The buffers of one model that its passes change; none until `learn`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.summed: frozenset[str] = frozenset()
        self.followed: frozenset[str] = frozenset()
        """Those that become rank 0's."""
        self._before: dict[str, torch.Tensor] = {}

    def learn(self, run: Callable[[], object]) -> None:
        """Finds the buffers that a pass changes, by calling `run` twice, which makes the same pass each time."""
        if next(iter(self._model.buffers()), None) is None:
            return
        with undisturbed(self._model):
            states = [self._values()]
            for _ in range(2):
                run()
                states.append(self._values())
        kinds = {name: _kind(*(state.get(name) for state in states)) for name in states[0]}
        self.summed = frozenset(name for name, kind in kinds.items() if kind == "summed")
        self.followed = frozenset(name for name, kind in kinds.items() if kind == "followed")

    def begin(self) -> None:
        """Notes what the buffers are before a step."""
        self._before = self._values(self.summed | self.followed)

    def undo(self) -> None:
        """Gives the buffers the values that they had at `begin`: the passes since then don't count."""
        for name, buffer in self._model.named_buffers() if self._before else ():
            _write(buffer, self._before.get(name))

    def changes(self, leads: bool) -> Changes:
        """Returns what this rank's passes did since `begin`. leads: whether this is rank 0."""
        now = self._values(self.summed | self.followed if leads else self.summed)
        added = {n: (now[n] - b).tolist() for n, b in self._before.items() if n in now and now[n].shape == b.shape}
        return added | {name: value.tolist() for name, value in now.items() if name in self.followed}

    def settle(self, everyone: Sequence[Changes]) -> None:
        """Gives the buffers the values that they have on all ranks after a step; everyone: `changes` by rank."""
        if not self.summed | self.followed:
            return
        buffers = dict(self._model.named_buffers())
        for name in self.summed & buffers.keys() & self._before.keys():
            parts = [torch.tensor(told[name], dtype=self._before[name].dtype) for told in everyone if name in told]
            _write(buffers[name], self._before[name].cpu() + torch.stack(parts).sum(0) if parts else None)
        for name in self.followed & buffers.keys():
            told = everyone[0].get(name)
            _write(buffers[name], None if told is None else torch.tensor(told, dtype=_wide(buffers[name])))

    def _values(self, names: frozenset[str] | None = None) -> dict[str, torch.Tensor]:
        """Returns copies in the widest type of their kind."""
        found = self._model.named_buffers()
        return {n: b.detach().to(_wide(b), copy=True) for n, b in found if names is None or n in names}


def unexpand(model: nn.Module) -> None:
    """Gives expanded buffers memory for all that they show, so that they can be loaded; not those that show others'."""
    memory: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout is torch.strided:
            memory[tensor.untyped_storage().data_ptr()] = memory.get(tensor.untyped_storage().data_ptr(), 0) + 1
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.layout is not torch.strided or buffer.numel() < 2 or 0 not in buffer.stride():
                continue
            if memory[buffer.untyped_storage().data_ptr()] == 1:
                module._buffers[name] = buffer.detach().clone(memory_format=torch.contiguous_format)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.complex128
    return torch.float64 if tensor.is_floating_point() else torch.int64


def _write(buffer: torch.Tensor, values: torch.Tensor | None) -> None:
    if values is not None and values.shape == buffer.shape:
        buffer.detach().copy_(values)


def _kind(before: torch.Tensor | None, once: torch.Tensor | None, twice: torch.Tensor | None) -> str:
    if before is None or once is None or twice is None or not before.shape == once.shape == twice.shape:
        return ""
    if torch.equal(before, once) and torch.equal(once, twice):
        return ""
    first, second = once - before, twice - once
    return "summed" if bool(first.any()) and torch.allclose(first, second, rtol=_RELATIVE, atol=0.0) else "followed"
