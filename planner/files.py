"""Strict TOML: a table becomes a frozen dataclass, and every mistake becomes one sentence.

The dataclass is the schema. Numbers must be finite and positive; a field made with `metadata=ZERO` may be zero.
Understood annotations: bool, int, float, str, Literal of strings, a dataclass, Any, X | None, tuple[X, ...],
dict[str, X] and dict[int, X].
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from heteromesh.errors import UserError

ZERO: Mapping[str, bool] = types.MappingProxyType({"zero": True})
"""Field metadata: zero is allowed (negative numbers never are)."""

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def read_text(path: Path, what: str) -> str:
    """Returns the text of a UTF-8 file; `what` names the kind of file ("cluster file") in the UserError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist: check the path") from None
    except OSError as error:
        raise UserError(f"{what} {path} can't be read ({error.strerror}): check the path and its permissions") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{what} {path} line {line} is not UTF-8 text: save the file as UTF-8") from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields where to write what is to become the file when the block ends; a block that raises leaves nothing.

    A power cut leaves the old file or the new one.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        make_durable(part)
        part.replace(path)
        make_durable(path.parent)
    finally:
        part.unlink(missing_ok=True)


def make_durable(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that can't do it for folders
            raise
    finally:
        os.close(descriptor)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Parses a TOML file; raises UserError naming file and line."""
    text = read_text(path, what)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        at = message.rpartition("(at line ")[2].partition(",")[0]
        line = at if at.isdigit() else str(text.count("\n") + 1)
        reason = message.partition(" (at ")[0]
        raise UserError(f"{what} {path} line {line} is not TOML ({reason}): correct that line") from None


def build(kind: type[T], table: object, where: str) -> T:
    """Builds the dataclass `kind` from a table; raises UserError, which begins with `where`, on any wrong key or
    value.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"{where} is {_show(table)}: it must be a table")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    for key in table:
        if key not in fields:
            raise unknown_key(str(key), fields, where)
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            zero = bool(field.metadata.get("zero"))
            values[name] = convert(hints[name], table[name], f"{where}: {name}", zero=zero)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} lacks the key {name!r}: add it (known keys: {', '.join(fields)})")
    return kind(**values)


def unknown_key(key: str, known: Iterable[str], where: str) -> UserError:
    """Returns the error for a key that is not known, with the closest known one."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UserError(f"{where} has the unknown key {key!r}{hint}: known keys are {', '.join(names)}")


def convert(kind: object, value: object, where: str, *, zero: bool = False) -> object:
    """`value` as the annotated type `kind`; raises UserError on a wrong type or a number out of range."""
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return convert(next(a for a in args if a is not type(None)), value, where, zero=zero)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} is {_show(value)}: it must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} is {_show(value)}: it must be a list")
        return tuple(convert(args[0], v, f"{where}[{i}]", zero=zero) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {_show(value)}: it must be a table")
        return {_key(args[0], k, where): convert(args[1], v, f"{where}.{k}", zero=zero) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    return _scalar(typing.cast(type, kind), value, where, zero)


def _key(kind: object, key: object, where: str) -> object:
    if kind is not int:
        return str(key)
    text = str(key)
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{where} has the key {text!r}: it must be a whole number")
    return int(text)


def _scalar(kind: type, value: object, where: str, zero: bool) -> object:
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} is {_show(value)}: it must be {_WORDS[kind]}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UserError(f"{where} is {value}: it must be {'zero or more' if zero else 'above zero'} and finite")
    return kind(value)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
