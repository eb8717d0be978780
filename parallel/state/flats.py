"""Parameters of a bucket one after the other in one flat tensor: a range of its elements is one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.collectives import wait_all
from heteromesh.comm.tcp.frame import bytes_of, checksum
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.errors import UserError
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.planner.ownership.ownership import Ownership, Range


class FlatBuckets:
    """The parameters of each bucket of gradients; from here on they are views of one flat tensor a bucket."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        self.flats = tuple(_flatten(bucket.parameters) for bucket in self.buckets)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each bucket."""
        return tuple(flat.numel() for flat in self.flats)

    @property
    def whole(self) -> list[list[Range]]:
        """Returns all of each bucket."""
        return [[(0, size)] for size in self.sizes]

    def fragments(self, ranges: Sequence[Sequence[Range]]) -> list[Fragment]:
        """Cuts out what the ranges of each bucket cover; of a parameter one fragment a range."""
        return [
            fragment
            for number, own in enumerate(ranges)
            for range_ in own
            for fragment in self._fragments_of(number, *range_)
        ]

    def _fragments_of(self, number: int, low: int, high: int) -> Iterator[Fragment]:
        return fragments_of(self.buckets[number], number, low, self.flats[number][low:high])

    def digest(self) -> str:
        """Returns a checksum of all values."""
        return ":".join(f"{checksum(bytes_of(flat)):x}" for flat in self.flats)

    def exchange(self, transport: TcpTransport, ownership: Ownership, members: Sequence[int]) -> None:
        """Sends every range from its source to all other ranks.

        What is held here, so that it can be handed out again, is overwritten only when all has arrived. `members`: ids
        by rank. Raises GroupAborted; LostState where a range has no source.
        """
        peers = [p for p in range(transport.size) if p != transport.rank]
        sources = [members.index(m) for m in ownership.sources(members)]
        held = ownership.held_by(members[transport.rank])
        works, arrived = [], []
        for flat in self.flats:
            for index, (start, stop) in enumerate(ownership.ranges(flat.numel())):
                part = flat[start:stop]
                if not peers or not part.numel():
                    continue
                if sources[index] == transport.rank:
                    view = bytes_of(part)
                    works += [transport.send_bytes(p, view, Tag.PARAMETERS, checked=True, keep=part) for p in peers]
                    continue
                place = part
                if index in held:
                    place = torch.empty_like(part)
                    arrived.append((part, place))
                works.append(transport.recv_bytes(sources[index], bytes_of(place), Tag.PARAMETERS))
        wait_all(works)
        for part, place in arrived:
            part.copy_(place)


def fragments_of(bucket: Bucket, number: int, low: int, memory: torch.Tensor) -> Iterator[Fragment]:
    """Yields what elements [low, low + n) of the number-th bucket cover, in memory (n,), of each whole parameter."""
    for parameter, shape, (start, stop) in zip(bucket.parameters, bucket.shapes, pairwise(bucket.offsets), strict=True):
        first, last = max(low, start), min(low + memory.numel(), stop)
        if first < last:
            part = memory[first - low : last - low]
            if bucket.cuts:  # whole, for an optimizer that needs its shape
                part = part.view(shape)
            yield Fragment(parameter, shape, first - start, nn.Parameter(part), number, first)


def _flatten(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Moves parameters into one flat tensor, of which they are views from now on."""
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return flat


def take_out(parameter: nn.Parameter) -> None:
    """Leaves a parameter without elements, so that what uses it fails; its memory is left to others who have it."""
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def check_parameters(optimizer: torch.optim.Optimizer, model: nn.Module, buckets: Sequence[Bucket]) -> None:
    """Raises UserError where buckets of the model's gradients can't be cut for this optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    bucketed = {p for bucket in buckets for p in bucket.parameters}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in names:
            raise UserError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's: "
                "give it the model's parameters only, or turn shard_optimizer and shard_weights off"
            )
        if parameter.requires_grad and parameter not in bucketed:
            raise UserError(
                f"parameter {names[parameter]} was made trainable after the executor had been made: "
                "set requires_grad before training starts"
            )
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and any(p in bucketed for p in module.parameters(recurse=False)):
            raise UserError(
                f"{name or type(module).__name__} has sparse gradients, which can't be sharded: "
                "build it with sparse=False or turn shard_optimizer and shard_weights off"
            )
