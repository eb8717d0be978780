"""The disk tier: a scratch file of packed subgroups, read and written past the page cache.

The file is no checkpoint: it lives as long as the optimizer, is refused if it is no longer what was written, and is
removed at the end. Files that runs which were killed have left in the same folder are removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import struct
import threading
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from heteromesh.errors import UserError

logger = logging.getLogger(__name__)

BLOCK = 4096
"""Bytes: what direct I/O wants memory, offsets and lengths to be multiples of."""
PIECE = 8 << 20
"""Bytes of one read or write. Two of each are under way: one alone leaves disks idle between pieces."""
_MAGIC = b"heteromesh optimizer state 1\n"
_HEADER = struct.Struct(f"<{len(_MAGIC)}s16sqq")


def aligned_buffer(numel: int) -> torch.Tensor:
    """Returns fp32 memory (n,) of whole blocks for at least `numel` elements, which begins at a block."""
    size = max(1, -(-numel * 4 // BLOCK)) * BLOCK
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32)


class StateFile:
    """Records of one size, by number. One thread may read while another one writes."""

    def __init__(self, folder: Path, records: int, numel: int) -> None:
        """numel: fp32 values of a record.

        Raises UserError where the folder can't be written or the disk has too little space: nothing is left there then.
        """
        self._bytes = aligned_bytes(numel)
        self._id, self._records = uuid.uuid4().bytes, records
        self.path = folder / f"optimizer-{self._id.hex()}.state"
        self.direct = True
        """Whether the page cache is left out."""
        self._giving_up = threading.Lock()
        # one thread beside the reader's and one beside the writer's
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="heteromesh-disk")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder)
            self._file = self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise UserError(
                f"the disk tier can't use {folder} ({error.strerror}): name a folder on a local disk"
            ) from error
        self._close = weakref.finalize(self, _remove, self._file, self.path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._reserve()
            self._transfer(os.pwritev, self._header(), 0)
        except OSError as error:
            self.close()
            raise UserError(self._no_space(error)) from error

    def read(self, record: int, buffer: torch.Tensor) -> None:
        """Fills the buffer (of `aligned_buffer`) with a record. Raises UserError where the file ends before it, or the
        disk fails.
        """
        self._transfer_record(os.preadv, "read", record, buffer)

    def write(self, record: int, buffer: torch.Tensor) -> None:
        """Makes the buffer a record. Raises UserError where the disk fails."""
        self._transfer_record(os.pwritev, "written", record, buffer)

    def check(self) -> None:
        """Raises UserError where the file is gone, cut, replaced or overwritten by another run."""
        way_out = "keep others out of that folder, and resume from the last checkpoint"
        try:
            there, here = self.path.stat(), os.fstat(self._file)
        except OSError as error:
            raise UserError(f"the optimizer's state file {self.path} is gone ({error.strerror}): {way_out}") from error
        if here.st_size != self._size:
            raise UserError(
                f"the optimizer's state file {self.path} has {here.st_size} bytes where {self._size} were written: "
                + way_out
            )
        header = aligned_buffer(1)
        self._transfer(os.preadv, _view(header, BLOCK), 0)
        same = bytes(_view(header, BLOCK)) == bytes(self._header())  # as floats NaN would differ from itself
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino) or not same:
            raise UserError(f"the optimizer's state file {self.path} is of another run: {way_out}")

    def close(self) -> None:
        """Removes the file."""
        self._helpers.shutdown()
        self._close()

    @property
    def _size(self) -> int:
        return BLOCK + self._records * self._bytes

    def _header(self) -> memoryview:
        block = mmap.mmap(-1, BLOCK)
        block.write(_HEADER.pack(_MAGIC, self._id, self._records, self._bytes))
        return memoryview(block)

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, flags | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0), 0o600)
        except OSError as error:
            if not self.direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._give_up_direct()
            self.path.unlink(missing_ok=True)  # some file systems make the file before they refuse
            return self._open(flags)

    def _reserve(self) -> None:
        """Takes the space of the whole file, so that no update can find the disk full."""
        try:
            os.posix_fallocate(self._file, 0, self._size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            zeros = memoryview(mmap.mmap(-1, PIECE))  # a file system that can't but by writing
            for offset in range(0, self._size, PIECE):
                self._transfer(os.pwritev, zeros[: self._size - offset], offset)

    def _give_up_direct(self) -> None:
        logger.warning("%s has no direct I/O: the disk tier goes through the page cache", self.path.parent)
        self.direct = False

    def _transfer_record(
        self, call: Callable[[int, list[memoryview], int], int], what: str, record: int, buffer: torch.Tensor
    ) -> None:
        view, offset = _view(buffer, self._bytes), BLOCK + record * self._bytes

        def pieces(starts: range) -> None:
            for start in starts:
                self._transfer(call, view[start : start + PIECE], offset + start)

        every = range(0, len(view), PIECE)
        try:
            helper = self._helpers.submit(pieces, every[1::2]) if len(every) > 1 else None
            try:
                pieces(every[::2])
            finally:
                if helper is not None:
                    wait([helper])
            if helper is not None:
                helper.result()
        except OSError as error:  # space was taken at the start, which not every file system keeps to
            raise UserError(
                f"the optimizer's state file {self.path} can't be {what} ({error.strerror}): mend the disk or free "
                "space on it, and resume from the last checkpoint"
            ) from error

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            piece, direct = view[done : done + PIECE], self.direct
            try:
                moved = call(self._file, [piece], offset + done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                with self._giving_up:
                    if self.direct:
                        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT
                        fcntl.fcntl(self._file, fcntl.F_SETFL, flags)
                        self._give_up_direct()
                continue
            if moved == 0:
                raise UserError(
                    f"the optimizer's state file {self.path} ends at {offset + done} bytes: "
                    "keep others out of that folder, and resume from the last checkpoint"
                )
            done += moved

    def _no_space(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return (
                f"{self.path.parent} has no space for {self._size / 1e9:.3f} GB of optimizer state ({error.strerror}): "
                "free some, name a folder on another disk, or give the disk tier less"
            )
        return f"the disk tier can't use {self.path.parent} ({error.strerror}): name a folder on a local disk"


def aligned_bytes(numel: int) -> int:
    """Returns the bytes of the blocks that hold so many fp32 values."""
    return -(-numel * 4 // BLOCK) * BLOCK


def _view(buffer: torch.Tensor, size: int) -> memoryview:
    view: Any = buffer.numpy()  # numpy's types don't tell that arrays are buffers
    return memoryview(view).cast("B")[:size]


def _remove(file: int, path: Path) -> None:
    try:
        if (found := path.stat()) and (found.st_dev, found.st_ino) == (os.fstat(file).st_dev, os.fstat(file).st_ino):
            path.unlink()
    except OSError:
        pass  # gone already
    os.close(file)


def remove_abandoned(folder: Path) -> None:
    """Removes state files that no process holds any more: whoever made one keeps it locked while it lives."""
    for path in folder.glob("optimizer-*.state"):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.read(file, len(_MAGIC)) == _MAGIC:
                path.unlink()
        except OSError:
            pass  # its run lives
        finally:
            os.close(file)
