"""What a thread or the process keeps beside values: random generators and autocast, taken along to where work goes on.

Random generators are the process's own and each pass draws its own numbers, so they change hands at every switch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch


class Generators(NamedTuple):
    """The states of the random generators of torch, of the device, of Python and of NumPy."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    @classmethod
    def current(cls, device: torch.device) -> Generators:
        """Returns the states as they are now."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), on_device, random.getstate(), np.random.get_state(legacy=False))

    def restore(self, device: torch.device) -> None:
        """Puts the generators into these states."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class OwnGenerators:
    """Random generators of one's own: states that are the process's within `active`, and go on from block to block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.states = Generators.current(device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draws from these generators within the block; afterwards the process's are as they were before."""
        outer = Generators.current(self._device)
        self.states.restore(self._device)
        try:
            yield
        finally:
            self.states = Generators.current(self._device)
            outer.restore(self._device)


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast settings of a thread; another thread has none of them."""

    enabled: tuple[tuple[str, torch.dtype], ...]
    """(kind of device, dtype) of those that are on."""

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        """Returns this thread's settings for the CPU and this device."""
        kinds = dict.fromkeys(("cpu", device.type))
        on = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
        return cls(on)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Has these settings on this thread within the block.

        Casts of weights are not cached: one made without a graph would be taken when the layer is computed again.
        """
        with ExitStack() as stack:
            for kind, dtype in self.enabled:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            yield
