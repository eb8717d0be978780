"""What each rank owns where parameters have one owner each: as they were dealt out, not as fractions would have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.gradients.buckets import Bucket


@dataclass(frozen=True, slots=True)
class OwnedBytes:
    """Of one rank."""

    weights: float
    """Of the trained weights that it owns, in their own dtype."""
    state: float
    """Of their optimizer state."""


def owned_bytes(
    buckets: Sequence[Bucket], collectives: Collectives, state: Mapping[nn.Parameter, float]
) -> list[OwnedBytes]:
    """Returns by rank what it owns; nothing where parameters are cut anywhere. state: bytes of optimizer state by
    parameter."""
    if not any(bucket.cuts for bucket in buckets):
        return []
    weights, states = [0.0] * collectives.size, [0.0] * collectives.size
    for bucket in buckets:
        parts = list(zip(bucket.parameters, bucket.shapes, pairwise(bucket.offsets), strict=True))
        for rank, (low, high) in enumerate(pairwise(bucket.bounds(collectives))):
            weights[rank] += (high - low) * bucket.dtype.itemsize
            for parameter, shape, (start, stop) in parts:
                own = max(0, min(high, stop) - max(low, start))
                states[rank] += own / max(1, shape.numel()) * state.get(parameter, 0.0)
    return [OwnedBytes(*both) for both in zip(weights, states, strict=True)]
