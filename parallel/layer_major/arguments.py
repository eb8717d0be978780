"""What layers are given and give back, as flat lists of plain values and tensors; anything else is refused."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from heteromesh.errors import UserError
from heteromesh.planner.model.mask import Mask

WAY_OUT = "train it pass by pass: shard_weights=False"
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum, Mask, np.generic,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
"""What is kept and given again as it is."""


class Flat(NamedTuple):
    """A tree of values, flattened."""

    leaves: list[Any]
    spec: TreeSpec

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Returns the same tree with other leaves; its mappings and lists are new ones."""
        return tree_unflatten(leaves, self.spec)


def flattened(values: Any, layer: str, what: str) -> Flat:
    """Returns the values as leaves. Raises UserError for one that is neither plain nor a tensor.

    layer, what: whose values they are and what it does with them, for the sentence.
    """
    leaves, spec = tree_flatten(values)
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *PLAIN)):
            raise UserError(
                f"layer {layer} {what} a {type(leaf).__name__}, which can't be kept and given again when the layer is "
                f"computed again in the backward: give layers tensors, numbers and mappings of them (Transformers: "
                f"use_cache=False), or {WAY_OUT}"
            )
    return Flat(leaves, spec)


def mappings_in(values: Any) -> Iterator[dict[Any, Any]]:
    """Yields the mappings in tuples, lists and mappings of values, outer ones first, always in the same order."""
    if isinstance(values, dict):
        yield values
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from mappings_in(value)


def lists_in(values: Any) -> Iterator[list[Any]]:
    """Yields the lists among values."""
    if isinstance(values, list):
        yield values
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from lists_in(value)


class MappingChange(NamedTuple):
    """What a layer has changed in a mapping that it was given."""

    entries: dict[Any, Any]
    removed: tuple[Any, ...]

    @classmethod
    def between(cls, before: dict[Any, Any], after: dict[Any, Any]) -> MappingChange:
        """Returns what has become other."""
        entries = {k: v for k, v in after.items() if k not in before or before[k] is not v}
        return cls(entries, tuple(k for k in before if k not in after))

    def apply(self, mapping: dict[Any, Any]) -> None:
        """Makes the change in a mapping that is as the other one was before."""
        mapping.update(self.entries)
        for key in self.removed:
            del mapping[key]
