"""Buckets: parameters whose gradients travel together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn

from heteromesh.comm.collectives.api import Collectives

BUCKET_BYTES = 8 << 20
_NONE: Mapping[nn.Parameter, torch.dtype] = {}


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters of one dtype and device whose gradients lie one after the other in a flat tensor."""

    parameters: tuple[nn.Parameter, ...]
    offsets: tuple[int, ...]
    """Of each parameter in the flat tensor, and its end."""
    shapes: tuple[torch.Size, ...] = ()
    """Of the parameters, which may lose their elements later (sharded weights)."""
    dtype: torch.dtype = field(init=False)
    """Of the gradients' sum, that of the parameters now: sharded weights may be given to layers in another one."""
    cuts: tuple[int, ...] = ()
    """Where each parameter has one owner: size + 1 offsets, rank i owns [cuts[i], cuts[i + 1]). Empty: cut anywhere."""
    _places: dict[nn.Parameter, int] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = self.shapes or tuple(p.shape for p in self.parameters)
        self.dtype = self.parameters[0].dtype
        self._places = {p: index for index, p in enumerate(self.parameters)}

    @property
    def numel(self) -> int:
        return self.offsets[-1]

    def empty(self) -> torch.Tensor:
        """Returns a flat tensor for the gradients."""
        return torch.empty(self.numel, dtype=self.dtype, device=self.parameters[0].device)

    def index(self, parameter: nn.Parameter) -> int:
        """Returns which of the bucket's parameters it is."""
        return self._places[parameter]

    def bounds(self, collectives: Collectives) -> tuple[int, ...]:
        """Returns size + 1 offsets: rank i owns [bounds[i], bounds[i + 1])."""
        return self.cuts or collectives.bounds(self.numel)

    def deal(self, owners: Sequence[int], size: int) -> None:
        """Gives each parameter to one of `size` ranks as a whole. Between steps, while nothing lies in a flat tensor.

        owners: by parameter, equal on every rank. Parameters are put in the order of their owners.
        """
        order = sorted(range(len(owners)), key=lambda index: owners[index])
        numels = [self.shapes[index].numel() for index in order]
        owned = [sum(n for i, n in zip(order, numels, strict=True) if owners[i] == rank) for rank in range(size)]
        self.parameters = tuple(self.parameters[index] for index in order)
        self.shapes = tuple(self.shapes[index] for index in order)
        self.offsets, self.cuts = tuple(accumulate(numels, initial=0)), tuple(accumulate(owned, initial=0))
        self.__post_init__()

    def view(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """Returns where the gradient of a parameter lies in the flat tensor."""
        return flat[self.offsets[index] : self.offsets[index + 1]].view(self.shapes[index])


def build_buckets(
    parameters: Iterable[nn.Parameter],
    bucket_bytes: int = BUCKET_BYTES,
    groups: Sequence[Sequence[nn.Parameter]] = (),
    working: Mapping[nn.Parameter, torch.dtype] = _NONE,
) -> list[Bucket]:
    """Returns the buckets of the parameters that require a gradient, in reverse order, as backward fills them.

    A parameter of more than `bucket_bytes` has a bucket of its own. groups: parameters whose gradients are complete
    before the others', group by group; no bucket has parameters of two groups. working: as for `pack`.
    """
    trained = [p for p in parameters if p.requires_grad]
    grouped = {p for group in groups for p in group}
    rest = [p for p in trained if p not in grouped]
    return [
        bucket
        for group in (*groups, rest)
        for bucket in pack(group, bucket_bytes, working)
        if bucket.parameters[0].requires_grad
    ]


def pack(
    parameters: Iterable[nn.Parameter],
    bucket_bytes: int = BUCKET_BYTES,
    working: Mapping[nn.Parameter, torch.dtype] = _NONE,
) -> list[Bucket]:
    """Returns buckets of the parameters, in reverse order.

    Frozen ones have buckets of their own, which come last, and so have those of each `working` dtype, in which weights
    are gathered.
    """
    order = list(parameters)[::-1]
    dtypes = list(dict.fromkeys(working.values()))
    places = {p: dtypes.index(dtype) + 1 for p, dtype in working.items()}
    found: list[list[nn.Parameter]] = []
    for parameter in sorted(order, key=lambda p: (not p.requires_grad, places.get(p, 0))):
        if not found or not _fits(found[-1], parameter, bucket_bytes, places):
            found.append([])
        found[-1].append(parameter)
    return [Bucket(tuple(own), tuple(accumulate((p.numel() for p in own), initial=0))) for own in found]


def _fits(
    members: list[nn.Parameter], parameter: nn.Parameter, bucket_bytes: int, places: Mapping[nn.Parameter, int]
) -> bool:
    def kind(p: nn.Parameter) -> tuple[torch.dtype, torch.device, bool, int]:
        return p.dtype, p.device, p.requires_grad, places.get(p, 0)

    size = sum(p.nbytes for p in members) + parameter.nbytes
    return kind(members[0]) == kind(parameter) and size <= bucket_bytes
