"""What a layer's graph saves while it waits for the backward: activations as they are, weights by name.

A layer whose activations are kept is not computed again. Its weights may be taken away meanwhile, so that the graph
must not hold them: of a tensor that lies in a parameter's memory only the place there is saved, and looked up again
when the backward needs it and the weights are back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.layer_major.arguments import WAY_OUT


class _InWeight(NamedTuple):
    """A tensor in a parameter's memory, the parameter itself or a view of it."""

    parameter: nn.Parameter
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """From the parameter's first element."""


class _Saved(NamedTuple):
    """A tensor, and how often it had been changed in place."""

    tensor: torch.Tensor
    version: int


@contextmanager
def weights_by_name(module: nn.Module, name: str) -> Iterator[None]:
    """Has graphs that are built within the block save no weights of the module (called `name` in messages).

    Their backward raises UserError for activations that were changed in place after they were saved.
    """
    homes: dict[int, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        homes.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)

    def pack(tensor: torch.Tensor) -> _InWeight | _Saved:
        home = _home(tensor, homes.get(tensor.untyped_storage().data_ptr(), ()))
        if home is None:
            return _Saved(tensor.detach(), tensor._version)
        offset = int(tensor.storage_offset() - home.storage_offset())
        return _InWeight(home, tuple(tensor.size()), tuple(tensor.stride()), offset)

    def unpack(packed: _InWeight | _Saved) -> torch.Tensor:
        if isinstance(packed, _InWeight):
            data = packed.parameter.detach()
            return data.as_strided(packed.size, packed.stride, data.storage_offset() + packed.offset)
        if packed.tensor._version != packed.version:
            raise UserError(
                f"what layer {name} needs in its backward is changed in place after the layer has run: have the model "
                f"make a new tensor, or {WAY_OUT}"
            )
        return packed.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _home(tensor: torch.Tensor, candidates: Sequence[nn.Parameter]) -> nn.Parameter | None:
    """Returns the parameter that a tensor lies in, if it does."""
    if not tensor.numel() or not candidates or tensor.dtype != candidates[0].dtype:
        return None
    first = tensor.storage_offset()
    last = first + sum((n - 1) * stride for n, stride in zip(tensor.size(), tensor.stride(), strict=True))
    for parameter in candidates:
        start = parameter.storage_offset()
        if start <= first and last < start + parameter.numel():
            return parameter
    return None
