"""The files of a checkpoint: on the disk before it counts, known by their digests, and read without running anything.

A checkpoint is written in a folder of its own, `step-00000040.TOKEN.part`, which its writer locks for as long as it
lives. When all ranks have written their share, `meta.json` gets the size and BLAKE2 digest of every file; then the
folder is made durable and renamed. So a name without `.part` is a checkpoint that was whole, and the digests tell
whether it still is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from heteromesh.comm.codec import PlainUnpickler
from heteromesh.errors import UserError
from heteromesh.planner.files import make_durable

META, METADATA, PART = "meta.json", ".metadata", ".part"
_KEYS = {"step": int, "parameters": dict, "trainer": dict}
"""What every meta.json has."""
FILE_BYTES, MOST_FILES = 16 << 20, 16
"""What a rank writes goes into files of so many bytes, or into so many files where these would be more."""
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)


class Superseded(RuntimeError):
    """Another process has taken over writing, and removed what this one was writing."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file as it was written."""

    name: str
    size: int
    digest: str


class PartWriter(FileSystemWriter):
    """Writes a checkpoint's files, then makes it whole. What goes wrong on a rank is raised on all of them."""

    def __init__(self, part: Path, final: Path, meta: Mapping[str, Any], *, first: bool) -> None:
        """`meta`: what meta.json is to have. `first`: whether this rank is the one that makes the checkpoint whole."""
        super().__init__(part)
        self._part, self._final, self._meta, self._first = part, final, meta, first
        self._lock = -1

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        folder = self._part.parent
        if not folder.is_dir():
            # torch would make it, and all folders above it, anew
            raise FileNotFoundError(errno.ENOENT, "it is not there any more", str(folder))
        prepared: SavePlan = super().prepare_local_plan(plan)
        if self._first:
            self._lock = _locked(self._part)
        return prepared

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: list[WriteResult] = []
        for part in _parts(plan):
            # torch holds what it copies, each part of a tensor, until its file is written
            written += super().write_data(part, planner).wait()
        for name in sorted({result.storage_data.relative_path for result in written}):
            digest = digest_of_file(self._part / name)
            written.append(WriteResult(MetadataIndex(name), digest.size, digest))
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        digests = [r.storage_data for each in results for r in each if isinstance(r.storage_data, FileDigest)]
        stored = {
            r.index: r.storage_data for each in results for r in each if not isinstance(r.storage_data, FileDigest)
        }
        self.make_whole(metadata, stored, digests)

    def make_whole(
        self, metadata: Metadata, stored: Mapping[MetadataIndex, Any], digests: Sequence[FileDigest]
    ) -> None:
        """Describes what is in the files and gives the checkpoint its name. stored: by entry, where it is."""
        super().finish(metadata, [[WriteResult(index, 0, place) for index, place in stored.items()]])
        digests = [*digests, digest_of_file(self._part / METADATA)]
        write_meta(self._part, {**self._meta, "files": {d.name: [d.size, d.digest] for d in digests}})
        make_durable(self._part)
        before = _set_aside(self._final)  # damaged, or of an earlier try at these steps
        self._part.rename(self._final)
        make_durable(self._final.parent)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    @property
    def superseded(self) -> bool:
        """Whether another process has removed what this one writes."""
        return self._lock >= 0 and not self._part.exists() and self._part.parent.is_dir()

    def close(self) -> None:
        """Removes what has not become whole, and gives the lock back."""
        descriptor, self._lock = self._lock, -1
        if descriptor >= 0:
            shutil.rmtree(self._part, ignore_errors=True)
            os.close(descriptor)


def _parts(plan: SavePlan) -> Iterator[SavePlan]:
    """Yields the plan in parts, a file each: of FILE_BYTES, or more where that would be many."""
    sizes = [_size(item) for item in plan.items]
    limit = max(FILE_BYTES, sum(sizes) / MOST_FILES)
    prefix, items, filled, count = plan.storage_data, list[WriteItem](), 0, 0
    for item, size in zip(plan.items, sizes, strict=True):
        if items and filled + size > limit:
            yield replace(plan, items=items, storage_data=_named(prefix, count))
            items, filled, count = [], 0, count + 1
        items.append(item)
        filled += size
    yield replace(plan, items=items, storage_data=_named(prefix, count))


def _named(prefix: Any, count: int) -> Any:
    """Returns the prefix of a part's file names, which differ from those of the others."""
    return type(prefix)(f"{prefix.prefix}{count}_") if count else prefix


def _size(item: WriteItem) -> int:
    data = item.tensor_data
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize if data is not None else 0


class MetadataReader(FileSystemReader):
    """Reads a checkpoint whose `.metadata`, a pickle, may have been written by somebody else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as file:
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"{METADATA} holds a {type(found).__name__}")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _MetadataUnpickler(PlainUnpickler):
    def known(self, module: str, name: str) -> Any:
        if module in (metadata.__name__, filesystem.__name__):
            found = getattr(metadata if module == metadata.__name__ else filesystem, name, None)
            return found if isinstance(found, type) and name in _DESCRIPTIONS else None
        if module == "torch":
            return found if isinstance(found := getattr(torch, name, None), _TORCH_VALUES) else None
        return torch.serialization._get_layout if (module, name) == ("torch.serialization", "_get_layout") else None


_DESCRIPTIONS = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
)


def digest_of_file(path: Path) -> FileDigest:
    """Reads a file; returns its name, size and digest. Raises OSError."""
    with path.open("rb") as file:
        told = hashlib.file_digest(file, "blake2b").hexdigest()
        return FileDigest(path.name, file.tell(), told)


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes meta.json with its own digest. Raises OSError."""
    with (folder / META).open("w") as file:
        json.dump({**meta, "digest": _digest_of(meta)}, file)
        file.flush()
        os.fsync(file.fileno())


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns meta.json. Raises UserError where it is not as it was written."""
    try:
        meta = json.loads((folder / META).read_text())
        told = meta.pop("digest", None)
        whole = all(isinstance(meta[key], kind) for key, kind in _KEYS.items()) and told in (None, _digest_of(meta))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f"checkpoint {folder} is incomplete ({META} is missing or damaged): "
            "remove it to resume from the one before, or start anew in another run directory"
        )
    assert isinstance(meta, dict)
    return meta


def damage(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """Returns what is wrong with a checkpoint's files, empty: nothing. Each of `ranks` reads its share of them."""
    try:
        files = read_meta(folder).get("files", {})
        for index, (name, (size, digest)) in enumerate(sorted(files.items())):
            if index % ranks == rank:
                found = digest_of_file(folder / name)
                if (found.size, found.digest) != (size, digest):
                    return f"{name} has other bytes than were written"
    except UserError:
        return f"{META} is missing or damaged"
    except OSError as error:
        return f"{Path(str(error.filename)).name} can't be read: {error.strerror}"
    except (TypeError, ValueError, AttributeError):
        return f"{META} is damaged"
    return ""


def remove(folder: Path) -> None:
    """Removes a checkpoint; it stops being one at once, also where this is cut off."""
    with suppress(OSError):
        aside = _set_aside(folder)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def remove_parts(directory: Path) -> None:
    """Removes checkpoints that nobody makes whole any more: those whose writers live are locked."""
    for part in directory.glob(f"*{PART}"):
        with suppress(OSError):
            descriptor = _locked(part)
            try:
                if descriptor >= 0:
                    shutil.rmtree(part, ignore_errors=True)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)


def _set_aside(folder: Path) -> Path | None:
    """Returns what a folder is called after this call; None: there is none."""
    if not folder.exists():
        return None
    return folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.old{PART}"))


def _locked(folder: Path) -> int:
    """Returns a descriptor that locks the folder until it is closed, or this process ends; -1: another one does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return -1
    except OSError:
        pass  # a file system without locks: a writer that was stopped and wakes up is told then (Superseded)
    return descriptor


def _digest_of(meta: Mapping[str, Any]) -> str:
    # as it is read back: keys that are numbers have become text then
    text = json.dumps(json.loads(json.dumps(meta)), sort_keys=True)
    return hashlib.blake2b(text.encode()).hexdigest()
