"""Files that a command writes with -o."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heteromesh.errors import UserError


def check_writable(path: Path) -> None:
    """Raises UserError where there can be no such file: before the work for it is done rather than after it."""
    if path.is_dir():
        raise UserError(f"-o {path} is a directory: give a file name in it")
    if not path.parent.is_dir():
        raise UserError(f"-o {path} is in a directory that does not exist: create {path.parent} first")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"-o {path} can't be written ({error.strerror}): free space or give another place") from None
