"""Fragments: which elements of which parameters a rank owns when buckets of parameters are cut between ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

_PLACE = "_fragment_place"

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes), one each a dimension."""


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """Elements [start, start + numel) of a parameter, counted in row-major order."""

    parameter: torch.nn.Parameter
    """The whole, as the model has it; where weights are sharded it may be empty at times."""
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    tensor: torch.nn.Parameter
    """(n,), or in the parameter's shape where that has one owner: the same memory; what the inner optimizer updates."""
    bucket: int
    """In which bucket of the gradients the parameter lies."""
    first: int
    """Where in the bucket's flat tensor the fragment begins."""

    def __post_init__(self) -> None:
        mark_fragment(self.tensor, self.start, self.shape.numel())

    @property
    def last(self) -> int:
        """Returns where in the bucket's flat tensor it ends."""
        return self.first + self.tensor.numel()

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Returns the fragment's elements (n,) of a tensor of the parameter's shape."""
        return whole.reshape(-1)[self.start : self.start + self.tensor.numel()]


def mark_fragment(tensor: torch.Tensor, start: int, numel: int) -> None:
    """Notes on a tensor that it is the elements from `start` on of one with so many, for optimizers that ask."""
    setattr(tensor, _PLACE, (start, numel))


def place_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the first element and the number of all elements of the tensor of which this is a fragment, or whole."""
    place: tuple[int, int] = getattr(tensor, _PLACE, (0, tensor.numel()))
    return place


class Piece:
    """A fragment of a tensor in a checkpoint: a range of its elements, stored and read as boxes of the whole tensor.

    With boxes a checkpoint looks the same whoever wrote it: whole tensors, or fragments of any number of ranks.
    """

    def __init__(self, tensor: torch.Tensor, shape: Sequence[int], start: int) -> None:
        """tensor (n,): elements [start, start + n) of a tensor of this shape, row-major."""
        self.tensor, self.shape, self.start = tensor, torch.Size(shape), start

    def size(self) -> torch.Size:
        """Returns the shape of the whole tensor."""
        return self.shape

    def copied(self) -> Piece:
        """Returns one with a copy of its elements in host memory."""
        return Piece(self.tensor.detach().to("cpu", copy=True), self.shape, self.start)

    def boxes(self) -> list[Box]:
        """Returns what the fragment covers; at most 2 * dimensions - 1 boxes."""
        return boxes(self.shape, self.start, self.start + self.tensor.numel())

    def box(self, offsets: Sequence[int]) -> torch.Tensor:
        """Returns the elements of the box that begins there, as a view in the box's shape."""
        sizes = next(s for o, s in self.boxes() if o == tuple(offsets))
        first = sum(o * math.prod(self.shape[i + 1 :]) for i, o in enumerate(offsets)) - self.start
        return self.tensor[first : first + math.prod(sizes)].view(sizes)

    def written(self) -> list[Box]:
        """Returns the boxes in which it is written, each of which `box` gives."""
        return self.boxes()

    def target(self, offsets: Sequence[int], first: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Returns memory for stored values of these sizes that begin at `first` in the box at `offsets`."""
        part = self.box(offsets)
        for dimension, (start, size) in enumerate(zip(first, sizes, strict=True)):
            part = part.narrow(dimension, start, size)
        return part

    def take(self, offsets: Sequence[int], first: Sequence[int], values: torch.Tensor) -> None:
        """Is called when values have been read into what `target` has given."""

    def loaded(self) -> Any:
        """Returns what an optimizer is given when all has been read: the elements (n,)."""
        return self.tensor


@runtime_checkable
class KeepsPieces(Protocol):
    """An optimizer that keeps values of elements where they can't all be had at once as tensors."""

    def checkpoint_pieces(self, parameter: torch.Tensor, shape: Sequence[int], start: int) -> dict[str, Any]:
        """Returns what a checkpoint has of a parameter of the optimizer, which is elements from `start` on of a tensor
        of this shape: `Piece` for what each element has a value of. An optimizer that is then given these pieces as
        the parameter's state has their values already.
        """


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Returns boxes, each contiguous in memory, that make up elements [start, stop) of a row-major tensor."""
    if stop <= start:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if len(shape) == 1 or (start == first * row and stop == (last + 1) * row):
        return [((first, *(0,) * (len(shape) - 1)), (last - first + 1, *shape[1:]))]
    if first == last:
        return _inside(shape, first, start, stop)
    head = [] if start == first * row else _inside(shape, first, start, (first + 1) * row)
    tail = [] if stop == (last + 1) * row else _inside(shape, last, last * row, stop)
    middle = boxes(shape, (first + bool(head)) * row, (last + 1 - bool(tail)) * row)
    return [*head, *middle, *tail]


def _inside(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    """Returns the boxes of a part of one row of the first dimension."""
    length = math.prod(shape[1:])
    inner = boxes(shape[1:], start - row * length, stop - row * length)
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in inner]
