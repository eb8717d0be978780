"""A model run to see what it does: afterwards it is as it was before.

Forwards may change a model without an optimizer: counters of tokens, biases of experts, caches. What a measurement or a
trial does to it is no training, so buffers, plain attributes of its modules and random generators are put back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

_BUFFERS = "_buffers"
_OTHERS = ("_parameters", "_modules")
"""Of a module, what is no state of forwards: names of weights and of parts."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers and its modules' attributes back after the block, and the random generators.

    Buffers and tensors get their values back in place, also where they were replaced. What a module keeps in containers
    of its own (lists, dicts) is not seen.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices), state_kept(model):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Has each module in the mode (training or evaluation) that it was in again after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Takes the gradients off the model's parameters within the block, and puts them back after it."""
    before = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers and its modules' attributes back after the block, and nothing else."""
    kept = [_Kept.of(module) for module in model.modules()]
    try:
        yield
    finally:
        for one in kept:
            one.put_back()


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a module had."""

    module: nn.Module
    buffers: dict[str, torch.Tensor | None]
    attributes: dict[str, Any]
    values: list[tuple[torch.Tensor, torch.Tensor, int]]
    """Each tensor, its values and its version."""

    @classmethod
    def of(cls, module: nn.Module) -> _Kept:
        """Notes what the module has."""
        buffers = dict(module._buffers)
        attributes = {k: v for k, v in vars(module).items() if k not in (_BUFFERS, *_OTHERS)}
        tensors = [v for v in (*buffers.values(), *attributes.values()) if isinstance(v, torch.Tensor)]
        values = [(t, t.detach().clone(), t._version) for t in tensors if not isinstance(t, nn.Parameter)]
        return cls(module, buffers, attributes, values)

    def put_back(self) -> None:
        """Gives the module what it had."""
        for tensor, value, version in self.values:
            memory = tensor.detach()
            # what is as it was stays untouched: a backward may still need it
            if tensor._version == version and torch.equal(memory, value):
                continue
            # an expanded tensor has fewer elements than it shows
            for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
                if size > 1 and stride == 0:
                    memory, value = memory.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
            memory.copy_(value)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        present = vars(self.module)
        for name in [n for n in present if n not in (_BUFFERS, *_OTHERS) and n not in self.attributes]:
            del present[name]
        present.update(self.attributes)
