"""A parameter's state in a checkpoint, where memory may not hold all of it: some megabytes at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from heteromesh.parallel.state.fragments import Box, Piece, boxes
from heteromesh.parallel.state.offload.subgroups import Subgroups

BOX = 1 << 22
"""Elements of a box that is written: 16 MB."""


class StoredPiece(Piece):
    """A row of a parameter's state, wherever its subgroups are."""

    def __init__(self, subgroups: Subgroups, index: int, row: int, shape: Sequence[int], start: int) -> None:
        """The parameter is elements from `start` on of a tensor of this shape, row-major."""
        super().__init__(torch.empty(0), shape, start)
        self.subgroups, self.index, self.row = subgroups, index, row
        self._stop = start + subgroups.parameters[index].numel()

    def copied(self) -> Piece:
        return Piece(self.subgroups.read(self.index, self.row, 0, self._stop - self.start), self.shape, self.start)

    def boxes(self) -> list[Box]:
        return boxes(self.shape, self.start, self._stop)

    def written(self) -> list[Box]:
        """Returns boxes of whole rows, as many as make up BOX elements."""
        row = math.prod(self.shape[1:])
        step = max(1, BOX // max(1, row)) * row
        inner = range((self.start // step + 1) * step, self._stop, step)
        return [box for low, high in pairwise((self.start, *inner, self._stop)) for box in boxes(self.shape, low, high)]

    def box(self, offsets: Sequence[int]) -> torch.Tensor:
        sizes = next(s for o, s in self.written() if o == tuple(offsets))
        return self.subgroups.read(self.index, self.row, self._place(offsets), math.prod(sizes)).view(sizes)

    def target(self, offsets: Sequence[int], first: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        return torch.empty(tuple(sizes))

    def take(self, offsets: Sequence[int], first: Sequence[int], values: torch.Tensor) -> None:
        begin = [offset + place for offset, place in zip(offsets, first, strict=True)]
        end = [place + size - 1 for place, size in zip(begin, values.shape, strict=True)]
        low, numel = self._place(begin), self._place(end) + 1 - self._place(begin)
        if numel == values.numel():
            self.subgroups.write(self.index, self.row, low, values.reshape(-1))
            return
        # a part of several rows: what lies between stays
        around = self.subgroups.read(self.index, self.row, low, numel)
        strides = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        around.as_strided(values.shape, strides).copy_(values)
        self.subgroups.write(self.index, self.row, low, around)

    def loaded(self) -> Piece:
        return self

    def _place(self, indices: Sequence[int]) -> int:
        """Returns which of the parameter's elements has these indices in the whole tensor."""
        return sum(at * math.prod(self.shape[d + 1 :]) for d, at in enumerate(indices)) - self.start
