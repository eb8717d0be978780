"""Parameters one after the other in one memory: a range of their elements is one message."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.collectives import wait_all
from heteromesh.comm.tcp.frame import bytes_of, checksum
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.runtime.training.ownership import Range

_ALIGN = 64


class Held(NamedTuple):
    """A fragment, and of what."""

    group: int
    """Of the optimizer."""
    number: int
    """Of the parameter among all of them."""
    fragment: Fragment


class FlatParameters:
    """The trained parameters of an optimizer's groups; from here on they are views of one tensor of bytes."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        owned = [(i, p) for i, group in enumerate(groups) for p in group if p.requires_grad and p.numel()]
        self._groups, self.parameters = [i for i, _ in owned], [p for _, p in owned]
        self._starts = list(accumulate((p.numel() for p in self.parameters), initial=0))
        sizes = [-(-p.nbytes // _ALIGN) * _ALIGN for p in self.parameters]
        self._offsets = list(accumulate(sizes, initial=0))
        self._memory = torch.zeros(self._offsets[-1], dtype=torch.uint8)
        for parameter, offset in zip(self.parameters, self._offsets, strict=False):
            room = self._memory[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            parameter.data = room.copy_(parameter.detach())

    @property
    def count(self) -> int:
        """Elements of all of them."""
        return self._starts[-1]

    @property
    def check(self) -> int:
        """A checksum of all values."""
        return checksum(bytes_of(self._memory))

    def fragments(self, range_: Range) -> list[Held]:
        """What a range covers, of each parameter at most one fragment."""
        start, stop = range_
        found = []
        for number, (parameter, low) in enumerate(zip(self.parameters, self._starts, strict=False)):
            first, last = max(start - low, 0), min(stop - low, parameter.numel())
            if first < last:
                tensor = nn.Parameter(parameter.detach().view(-1)[first:last])
                found.append(Held(self._groups[number], number, Fragment(parameter, first, tensor, 0, 0)))
        return found

    def exchange(self, transport: TcpTransport, sources: Sequence[tuple[Range, int]], kept: Sequence[Range]) -> None:
        """Every range from the rank that is its source to all others. What is `kept` here, so that it can be handed
        out again, is overwritten only when all has arrived. Raises GroupAborted."""
        peers = [p for p in range(transport.size) if p != transport.rank]
        works, arrived = [], []
        for range_, source in sources:
            part = self._part(range_)
            if not peers or not part.numel():
                continue
            if source == transport.rank:
                view = bytes_of(part)
                works += [transport.send_bytes(p, view, Tag.PARAMETERS, checked=True, keep=part) for p in peers]
                continue
            room = part
            if range_ in kept:
                room = torch.empty_like(part)
                arrived.append((part, room))
            works.append(transport.recv_bytes(source, bytes_of(room), Tag.PARAMETERS))
        wait_all(works)
        for part, room in arrived:
            part.copy_(room)

    def _part(self, range_: Range) -> torch.Tensor:
        start, stop = range_
        if start == stop:
            return self._memory[:0]
        return self._memory[self._byte(start) : self._byte(stop - 1) + self._itemsize(stop - 1)]

    def _byte(self, element: int) -> int:
        number = bisect_right(self._starts, element) - 1
        return self._offsets[number] + (element - self._starts[number]) * self._itemsize(element)

    def _itemsize(self, element: int) -> int:
        return self.parameters[bisect_right(self._starts, element) - 1].element_size()
