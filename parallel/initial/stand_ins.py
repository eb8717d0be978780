"""Weights that stand in for those of a model that fits no rank, while it is tried and measured.

What is outside layers has memory of its own. Parameters of layers share theirs with those of the same shape in other
layers, so that all layers together take no more than one of each kind.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from heteromesh.comm.dtypes import in_accumulation_dtype
from heteromesh.parallel.initial.memory import give_memory

_SPREAD = 0.02
_SAMPLE = 8192
"""Elements of a gradient that are looked at, beside the sums of its rows."""


def stand_in(
    parameters: Mapping[nn.Parameter, tuple[str, torch.Size]],
    layers: Sequence[Sequence[nn.Parameter]],
    device: torch.device,
) -> None:
    """Gives parameters memory with values as a fresh model might have them, the same on every rank.

    parameters: their names and shapes. layers: by layer the parameters that are its alone.
    """
    shared: dict[tuple[int, torch.dtype, torch.Size], torch.Tensor] = {}
    for own in layers:
        seen: Counter[tuple[torch.dtype, torch.Size]] = Counter()
        for parameter in own:
            if parameter not in parameters:
                continue
            name, shape = parameters[parameter]
            kind = parameter.dtype, shape
            key = seen[kind], *kind
            seen[kind] += 1
            if key not in shared:
                shared[key] = _values(name, shape, parameter.dtype, device)
            give_memory(parameter, shared[key].view(shape), name)
    inside = {p for own in layers for p in own}
    for parameter, (name, shape) in parameters.items():
        if parameter not in inside:
            give_memory(parameter, _values(name, shape, parameter.dtype, device), name)


def _values(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns small values for matrices, and values near one for the scales of norms."""
    generator = torch.Generator(device).manual_seed(
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    )
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.normal_(0.0 if len(shape) > 1 else 1.0, _SPREAD, generator=generator)


class GradientSketches:
    """Drops the gradients of parameters as soon as a backward has made them; within `kept`, keeps a sketch of each.

    A sketch is the sum over passes of some of a gradient's elements and of its rows' sums: two orders of the same
    computation differ in it where they differ in what many elements depend on. Until `close`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sketches: dict[nn.Parameter, torch.Tensor] | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters if p.requires_grad]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps sketches within the block."""
        self._sketches = {}
        try:
            yield
        finally:
            self._sketches = None

    def take(self) -> dict[nn.Parameter, torch.Tensor]:
        """Returns the sketches since the last call, and begins new ones."""
        assert self._sketches is not None
        found, self._sketches = self._sketches, {}
        return found

    def close(self) -> None:
        """Lets gradients stay again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _arrived(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if self._sketches is not None:
            sketch, known = _sketch(parameter.grad.to_dense()), self._sketches.get(parameter)
            self._sketches[parameter] = sketch if known is None else known + sketch
        parameter.grad = None


def _sketch(gradient: torch.Tensor) -> torch.Tensor:
    """Returns (m,), at most 8192 elements of the gradient and its rows' sums, scaled as the elements are, in float32 at
    least: the same for equal values in 16 and in 32 bit."""
    gradient = in_accumulation_dtype(gradient.detach())
    flat = gradient.reshape(-1)
    some = flat[:: max(1, -(-flat.numel() // _SAMPLE))]
    if gradient.dim() < 2:
        return some.clone()
    rows = gradient.flatten(1)
    return torch.cat([some, rows.sum(1) / rows.shape[1] ** 0.5])
