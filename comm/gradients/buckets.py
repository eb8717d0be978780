"""Buckets: parameters whose gradients travel together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

BUCKET_BYTES = 8 << 20


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters of one dtype and device whose gradients lie one after the other in a flat tensor."""

    parameters: tuple[nn.Parameter, ...]
    offsets: tuple[int, ...]
    """Of each parameter in the flat tensor, and its end."""
    shapes: tuple[torch.Size, ...] = ()
    """Of the parameters, which may lose their elements later (sharded weights)."""

    def __post_init__(self) -> None:
        self.shapes = self.shapes or tuple(p.shape for p in self.parameters)

    @property
    def numel(self) -> int:
        return self.offsets[-1]

    def empty(self) -> torch.Tensor:
        """Returns a flat tensor for the gradients."""
        like = self.parameters[0]
        return torch.empty(self.numel, dtype=like.dtype, device=like.device)

    def view(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """Returns where the gradient of a parameter lies in the flat tensor."""
        return flat[self.offsets[index] : self.offsets[index + 1]].view(self.shapes[index])


def build_buckets(
    parameters: Iterable[nn.Parameter],
    bucket_bytes: int = BUCKET_BYTES,
    groups: Sequence[Sequence[nn.Parameter]] = (),
) -> list[Bucket]:
    """Returns the buckets of the parameters that require a gradient, in reverse order, as backward fills them.

    A parameter of more than `bucket_bytes` has a bucket of its own. groups: parameters whose gradients are complete
    before the others', group by group; no bucket has parameters of two groups.
    """
    trained = [p for p in parameters if p.requires_grad]
    grouped = {p for group in groups for p in group}
    rest = [p for p in trained if p not in grouped]
    return [
        bucket
        for group in (*groups, rest)
        for bucket in pack(group, bucket_bytes)
        if bucket.parameters[0].requires_grad
    ]


def pack(parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Returns buckets of the parameters, in reverse order; frozen ones have buckets of their own, which come last."""
    order = list(parameters)[::-1]
    found: list[list[nn.Parameter]] = []
    for parameter in sorted(order, key=lambda p: not p.requires_grad):
        if not found or not _fits(found[-1], parameter, bucket_bytes):
            found.append([])
        found[-1].append(parameter)
    return [Bucket(tuple(own), tuple(accumulate((p.numel() for p in own), initial=0))) for own in found]


def _fits(members: list[nn.Parameter], parameter: nn.Parameter, bucket_bytes: int) -> bool:
    def kind(p: nn.Parameter) -> tuple[torch.dtype, torch.device, bool]:
        return p.dtype, p.device, p.requires_grad

    size = sum(p.nbytes for p in members) + parameter.nbytes
    return kind(members[0]) == kind(parameter) and size <= bucket_bytes
