"""Plain state as text: what torch.save writes, read back by torch's unpickler that makes values and tensors only.

JSON would turn tuples into lists and keys that are numbers into strings, and has no tensors: a schedule that was given
such a state goes on as another.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch


def to_text(state: Any) -> str:
    """Returns the state as text. Raises whatever pickling it does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def from_text(text: str) -> Any:
    """Returns what `to_text` was given. Raises pickle.UnpicklingError for what is neither a value nor a tensor."""
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True, map_location="cpu")


def is_same(one: Any, other: Any) -> bool:
    """Whether two states are equal in values and in types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)
