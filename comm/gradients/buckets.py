"""Buckets: parameters whose gradients travel together."""

from __future__ import annotations

from collections.abc import Iterable
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

    @property
    def numel(self) -> int:
        return self.offsets[-1]

    def empty(self) -> torch.Tensor:
        """Returns a flat tensor for the gradients."""
        like = self.parameters[0]
        return torch.empty(self.numel, dtype=like.dtype, device=like.device)

    def view(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """Returns where the gradient of a parameter lies in the flat tensor."""
        return flat[self.offsets[index] : self.offsets[index + 1]].view(self.parameters[index].shape)


def build_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Returns the buckets of the parameters that require a gradient, in reverse order, as backward fills them.

    A parameter of more than `bucket_bytes` has a bucket of its own.
    """
    found: list[list[nn.Parameter]] = []
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        if not found or not _fits(found[-1], parameter, bucket_bytes):
            found.append([])
        found[-1].append(parameter)
    return [Bucket(tuple(own), tuple(accumulate((p.numel() for p in own), initial=0))) for own in found]


def _fits(members: list[nn.Parameter], parameter: nn.Parameter, bucket_bytes: int) -> bool:
    same = members[0].dtype == parameter.dtype and members[0].device == parameter.device
    return same and sum(p.nbytes for p in members) + parameter.nbytes <= bucket_bytes
