"""First weights from safetensors files, as Transformers' `save_pretrained` writes them: only what is asked for is read.

A folder has `model.safetensors`, or several files and `model.safetensors.index.json`, which says what is where. Names
are those of the model's own tensors, tied ones once; a prefix that only a base model's files lack is allowed for, what
PEFT puts around names, and experts that Transformers merges.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.initial.converted import StoredWeight, converted
from heteromesh.parallel.model.call import plain_name
from heteromesh.parallel.state.weight_source import WeightSource

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What PEFT has in names of the base model's tensors."""
_EDGE = 64 << 10
"""Bytes at both ends of a file by which it is known."""


class FileWeights(WeightSource):
    """The weights of a model in files."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        """Raises UserError where the path has no such files, and for tensors of other shapes; `refuse` for others."""
        self._path, self._kind = path, type(model).__name__
        self._files = _files(path)
        self._found: dict[str, tuple[list[int], str]] = {}
        self._open: tuple[Path, Any] | None = None
        for name, file in self._files.items():
            part = self._opened(file).get_slice(name)
            self._found[name] = part.get_shape(), part.get_dtype()
        self._stored = converted(model, self._found)
        self._names: dict[torch.Tensor, str] = {}
        self.absent: dict[torch.Tensor, str] = {}
        """Parameters and buffers of the model that the files don't have, and their names."""
        self._match(model)

    def read(self, parameter: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See WeightSource; also for a buffer."""
        made, before = [], 0
        for name in self._stored[self._names[parameter]].parts:
            size = math.prod(self._found[name][0])
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                made.append(self._read(name, first, last))
            before += size
        return made[0] if len(made) == 1 else torch.cat(made)

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a tensor in the files: only the rows that cover them are read."""
        (shape, _), file = self._found[name], self._opened(self._files[name])
        if not shape:
            whole: torch.Tensor = file.get_tensor(name)
            return whole.view(-1)[start:stop]
        row = max(1, math.prod(shape[1:]))
        first, last = start // row, -(-stop // row)
        rows: torch.Tensor = file.get_slice(name)[first:last]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the files have a parameter or buffer of the model."""
        return tensor in self._names

    def forget(self) -> None:
        """Closes the file that was read last."""
        self._open = None

    def fingerprint(self) -> str:
        """Returns a digest of names, shapes and dtypes, and of the ends of the files."""
        digest = hashlib.sha256(json.dumps(sorted(self._found.items())).encode())
        for file in sorted(set(self._files.values())):
            with file.open("rb") as opened:
                size = opened.seek(0, 2)
                digest.update(str(size).encode())
                for place in (0, max(0, size - _EDGE)):
                    opened.seek(place)
                    digest.update(opened.read(_EDGE))
        return digest.hexdigest()[:12]

    def refuse(self, lacking: Mapping[torch.Tensor, str]) -> None:
        """Raises UserError for what the files lack, by tensor its name, else for what they have beside the model's."""
        if lacking:
            raise UserError(
                f"the weights in {self._path} lack {_listed(list(lacking.values()))} of {self._kind}: give the files "
                "of this very model, with names as in model.state_dict() (where Transformers has others in its files: "
                "model.save_pretrained(folder, save_original_format=False))"
            )
        if self._more:
            raise UserError(
                f"the weights in {self._path} have {_listed(self._more)}, which {self._kind} does not have: give the "
                "files of this very model, or leave these out of them"
            )

    def _match(self, model: nn.Module) -> None:
        """Finds out which name in the files is which tensor's."""
        used: set[str] = set()
        for tensor, names in _tensors(model).items():
            found = [name for own in names for name in _spellings(model, own) if name in self._stored]
            if not found:
                self.absent[tensor] = names[0]
                continue
            self._names[tensor] = found[0]
            used.update(found)
            self._check(names[0], tensor, self._stored[found[0]])
        ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self._more = [name for name in self._stored if name not in used and not any(p.search(name) for p in ignored)]

    def _check(self, name: str, tensor: torch.Tensor, stored: StoredWeight) -> None:
        if tuple(tensor.shape) != stored.shape:
            raise UserError(
                f"the weights in {self._path} have {name} of shape {stored.shape}, and the model's is "
                f"{tuple(tensor.shape)}: build the model from the config that the files came with"
            )
        if tensor.is_floating_point() and not set(stored.dtype.split(", ")) <= set(_FLOATS):
            raise UserError(
                f"the weights in {self._path} have {name} as {stored.dtype}, and the model's is "
                f"{str(tensor.dtype).removeprefix('torch.')}: give files in float32, bfloat16 or float16"
            )

    def _opened(self, file: Path) -> Any:
        """Returns a file, open; only one is at a time, as what is read of it counts as this process's memory."""
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = file, _open(file)
        return self._open[1]


def _files(path: Path) -> dict[str, Path]:
    """Returns by name of a tensor the file that it is in. Raises UserError."""
    if path.is_dir():
        if (path / INDEX).is_file():
            return _indexed(path / INDEX)
        file = path / SINGLE
        if not file.is_file():
            raise UserError(
                f"weights is {str(path)!r}, a folder with neither {SINGLE} nor {INDEX}: give a folder or file of "
                "safetensors, as model.save_pretrained(folder) writes it"
            )
        path = file
    elif not path.is_file():
        raise UserError(f"weights is {str(path)!r}, which is not there: give a folder or file of safetensors")
    elif path.name.endswith(".index.json"):
        return _indexed(path)
    return dict.fromkeys(_open(path).keys(), path)


def _indexed(index: Path) -> dict[str, Path]:
    try:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = {name: index.parent / file for name, file in names.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index} is no index of safetensors ({type(error).__name__}: {error}): write it with save_pretrained"
        ) from None
    for file in sorted(set(files.values())):
        held = set(_open(file).keys())
        lacking = [name for name, where in files.items() if where == file and name not in held]
        if lacking:
            raise UserError(
                f"{file} lacks {_listed(lacking)}, which {index.name} has there: copy the folder again, whole"
            )
    # in the order of files: only one is open at a time
    return dict(sorted(files.items(), key=lambda item: str(item[1])))


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("weights= reads safetensors, which is not installed: pip install safetensors") from None
    try:
        return safe_open(str(file), "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} can't be read as safetensors ({type(error).__name__}: {error}): copy it again, or save the model "
            "with save_pretrained"
        ) from None


def _tensors(model: nn.Module) -> dict[torch.Tensor, list[str]]:
    """Returns the model's parameters and the buffers that are saved, each with all its names."""
    found: dict[torch.Tensor, list[str]] = {}
    kept = set(model.state_dict(keep_vars=True))
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if name in kept:
            found.setdefault(tensor, []).append(plain_name(name))
    return found


def _spellings(model: nn.Module, name: str) -> Iterator[str]:
    """Yields what a tensor may be called in files, its own name first."""
    yield name
    if hasattr(model, "peft_config"):
        name = _WRAPPED.sub("", name.removeprefix("base_model.model."))
        yield name
    prefix = getattr(model, "base_model_prefix", "")
    if isinstance(prefix, str) and prefix:
        if name.startswith(f"{prefix}."):
            yield name.removeprefix(f"{prefix}.")
        yield f"{prefix}.{name}"


def _listed(names: list[str]) -> str:
    """Returns the first names in words."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
