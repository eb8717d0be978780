"""Values on their way between processes, or in a file that others may have written, as bytes that bring no code.

They are pickles, read with a list of what may be in them: plain values, tensors, NumPy's numbers and arrays,
exceptions, and this package's own data classes, named tuples and enumerations. Whoever can write such bytes can send
wrong values, as can whoever sends wrong gradients, but can't run anything.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import importlib
import io
import pickle
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from heteromesh.errors import UserError

PLAIN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "collections": ("OrderedDict", "defaultdict", "deque", "Counter"),
        "builtins": ("complex", "set", "frozenset", "bytearray", "range", "slice"),
        "datetime": ("date", "datetime", "timedelta", "timezone"),
        "fractions": ("Fraction",),
        "pathlib": ("PosixPath", "PurePosixPath"),
        "torch": ("Size",),
    }
)
"""Types beyond Python's literals that any value may hold, by module."""
_NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_ARRAYS = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
_DATA = (tuple, enum.Enum, BaseException)


class PlainUnpickler(pickle.Unpickler):
    """Builds plain values, and of other classes those that `known` finds. Raises UnpicklingError for any other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member_of  # as Python 3.11.0 to 3.11.3 pickles a member of an enumeration
        plain = name in PLAIN.get(module, ())
        found = super().find_class(module, name) if plain else self.known(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}: only plain values and tensors travel")
        return found

    def known(self, module: str, name: str) -> Any:
        """Returns a class that may be used, or None."""
        del module, name


def _member_of(kind: Any, name: str) -> enum.Enum:
    """Returns an enumeration's member, of no other class anything."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}: only plain values and tensors travel")
    return kind.__members__[name]


def encode(value: Any) -> bytes:
    """Returns the value as bytes; an exception that the other end can't know becomes a RuntimeError with its text.

    Raises UserError for a value that `decode` would not take.
    """
    buffer = io.BytesIO()
    _Packer(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def decode(data: bytes) -> Any:
    """Returns what `encode` was given. Raises pickle.UnpicklingError where bytes hold what no value may."""
    return _Unpacker(io.BytesIO(data)).load()


def to_tensor(value: Any) -> torch.Tensor:
    """Returns what `encode` does as a tensor of bytes, (n,), for collectives."""
    return torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)


def from_tensor(data: torch.Tensor) -> Any:
    """Returns what `to_tensor` was given."""
    return decode(data.numpy().tobytes())


class _Packer(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype).removeprefix("torch."), tuple(value.shape), flat.numpy().tobytes()

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, BaseException) and _data_class(kind.__module__, kind.__qualname__) is None:
            return RuntimeError, (f"{kind.__name__}: {value}",)
        if isinstance(value, type) and value.__qualname__ not in PLAIN.get(value.__module__, ()):
            module, name = value.__module__, value.__qualname__
            if _data_class(module, name) is None:
                raise UserError(
                    f"a {module}.{name} can't be told to other ranks, which take plain values, tensors and arrays "
                    "only: send what it holds"
                )
        return NotImplemented


class _Unpacker(PlainUnpickler):
    def persistent_load(self, place: Any) -> torch.Tensor:
        name, shape, raw = place
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{name} is no dtype")
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return flat.view(dtype).reshape(shape)

    def known(self, module: str, name: str) -> Any:
        return _data_class(module, name)


def _data_class(module: str, name: str) -> Any:
    """Returns a class that only holds data, if this is the name of one."""
    if module in _NUMPY:
        return getattr(importlib.import_module(module), name, None) if name in _ARRAYS else None
    if module == "builtins":
        found = getattr(builtins, name, None)
        return found if isinstance(found, type) and issubclass(found, BaseException) else None
    if module.partition(".")[0] != "heteromesh" or module.endswith("__main__"):
        return None
    found = getattr(importlib.import_module(module), name, None)
    holds = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, _DATA))
    return found if holds else None
