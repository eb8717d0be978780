"""Documents: text out of a folder, a JSONL, Parquet or text file, or the standard library's own sources.

Documents stream: one is in memory at a time, in an order that depends only on names and lines. What can't be
text (binary, not UTF-8, empty, unreadable) is skipped and counted; `DocumentReader.report` says how much.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from heteromesh.errors import UserError

STDLIB = "python-stdlib"
WAY_OUT = f"name a folder, a .jsonl, .parquet or text file, or {STDLIB}"
_FOREIGN = frozenset({"__pycache__", "site-packages", "dist-packages"})
_RECORD_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a corpus."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents read."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""

    def describe(self) -> str:
        """`1786 documents (31.5 MB), skipped 12: 8 empty, 4 not UTF-8`."""
        text = f"{self.documents} documents ({self.bytes / 1e6:.1f} MB)"
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{text}, skipped {sum(self.skipped.values())}: {reasons}" if reasons else f"{text}, none skipped"


class _File(NamedTuple):
    path: str
    """Relative to the corpus' root."""
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Which files hold the documents; made by `open_corpus`, read by `read`."""

    name: str
    root: Path
    files: tuple[_File, ...]
    field: str
    limit: int | None
    unreadable: int = 0
    """Entries that could not even be looked at."""

    @property
    def fingerprint(self) -> str:
        """Changes with any file's path, size or modification time, the field and the limit."""
        digest = hashlib.blake2b(f"{self.field}\0{self.limit}\0".encode(), digest_size=16)
        digest.update(os.fsencode(self.root))
        for file in self.files:
            digest.update(b"\0" + os.fsencode(file.path) + f"\0{file.bytes}\0{file.mtime_ns}".encode())
        return digest.hexdigest()

    def read(self) -> DocumentReader:
        """A fresh pass over the documents."""
        return DocumentReader(self)


def open_corpus(source: str | Path = STDLIB, *, field: str = "text", limit: int | None = None) -> Corpus:
    """The documents of `source`: `python-stdlib`, a folder, a .jsonl or .parquet file, or one text file.

    `field` is the JSONL key or Parquet column that holds the text; `limit` keeps only the first documents. A folder
    of nothing but .jsonl (or nothing but .parquet) files is read record by record, any other folder file by file.
    Raises UserError for a missing path, an empty folder, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"document limit {limit} is below 1: give a positive number, or none to read everything")
    if str(source) == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files, unreadable = _walk(root, suffix=".py")
    else:
        root = Path(source).expanduser().resolve()
        try:
            info = root.stat()
        except OSError as error:
            raise UserError(f"data source {source} can't be opened ({error.strerror}): {WAY_OUT}") from None
        if stat.S_ISDIR(info.st_mode):
            files, unreadable = _walk(root)
        elif stat.S_ISREG(info.st_mode):
            files, unreadable, root = [_File(root.name, info.st_size, info.st_mtime_ns)], 0, root.parent
        else:
            raise UserError(f"data source {source} is neither a file nor a folder: {WAY_OUT}")
    if not files:
        raise UserError(f"data source {source} holds no files (hidden ones don't count): {WAY_OUT}")
    return Corpus(
        name=str(source), root=root, files=tuple(sorted(files)), field=field, limit=limit, unreadable=unreadable
    )


def _walk(root: Path, suffix: str = "") -> tuple[list[_File], int]:
    """Regular files below root, and how many entries could not be looked at. Links to folders are not followed."""
    files: list[_File] = []
    errors: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=errors.append):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in _FOREIGN]
        for name in names:
            if name.startswith(".") or not name.endswith(suffix):
                continue
            path = os.path.join(folder, name)
            try:
                info = os.stat(path)
            except OSError as error:
                errors.append(error)
                continue
            if stat.S_ISREG(info.st_mode):  # opening a pipe or a device could block for ever
                files.append(_File(Path(path).relative_to(root).as_posix(), info.st_size, info.st_mtime_ns))
    return files, len(errors)


class DocumentReader:
    """Iterator over a corpus' documents that counts as it goes.

    Raises UserError for a JSONL line or Parquet file that is malformed or lacks the field, and at the end when
    there was not one document.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._documents = self._bytes = 0
        self._skipped = Counter({"unreadable": corpus.unreadable} if corpus.unreadable else {})
        self._total = max(1, sum(f.bytes for f in corpus.files))
        self._done = 0.0
        self._stream = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._stream)

    @property
    def report(self) -> Report:
        """What was read and skipped so far."""
        return Report(documents=self._documents, bytes=self._bytes, skipped=dict(self._skipped))

    @property
    def fraction(self) -> float:
        """Share of the work done, 0 to 1."""
        of_bytes = min(1.0, self._done / self._total)
        return max(of_bytes, self._documents / self._corpus.limit) if self._corpus.limit else of_bytes

    def _read(self) -> Iterator[str]:
        for text in self._texts():
            if not text:
                self._skipped["empty"] += 1
                continue
            size = _utf8_bytes(text)
            if size is None:
                self._skipped["not UTF-8"] += 1
                continue
            self._documents += 1
            self._bytes += size
            yield text
            if self._documents == self._corpus.limit:
                return
        if not self._documents:
            raise UserError(f"data source {self._corpus.name} gave {self.report.describe()}: {WAY_OUT}")

    def _texts(self) -> Iterator[str | None]:
        suffixes = {Path(f.path).suffix.lower() for f in self._corpus.files}
        records = suffixes.pop() if len(suffixes) == 1 else ""
        for file in self._corpus.files:
            path, start = self._corpus.root / file.path, self._done
            if records in _RECORD_SUFFIXES:
                try:
                    yield from self._jsonl(path) if records == ".jsonl" else self._parquet(path, file.bytes)
                except OSError as error:
                    raise UserError(
                        f"data file {path} can't be read ({error.strerror or error}): mend or remove it"
                    ) from None
            elif (text := self._file(path)) is not None:
                yield text
            self._done = start + file.bytes

    def _file(self, path: Path) -> str | None:
        """The text of a file; None, counted, where there is none."""
        try:
            data = path.read_bytes()
        except OSError:
            self._skipped["unreadable"] += 1
            return None
        if b"\0" in data:
            self._skipped["binary"] += 1
            return None
        return self._decode(data)

    def _decode(self, data: bytes) -> str | None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            self._skipped["not UTF-8"] += 1
            return None

    def _jsonl(self, path: Path) -> Iterator[str | None]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                self._done += len(line)
                text = self._decode(line)
                if text and not text.isspace():
                    yield _record_text(text, self._corpus.field, f"data file {path} line {number}")

    def _parquet(self, path: Path, size: int) -> Iterator[str | None]:
        for value, share in _parquet_column(path, self._corpus.field):
            self._done += share * size
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                self._skipped["not UTF-8"] += 1


def _utf8_bytes(text: str) -> int | None:
    """Length in UTF-8; None for a lone surrogate (JSON can spell one), which UTF-8 can't hold."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def _record_text(line: str, key: str, where: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where} is not JSON ({reason}): mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is {_kind(record)}, not a JSON object: give an object with the key {key!r}")
    if key not in record:
        raise UserError(f"{where} has no key {key!r}: {_other_field(list(record))}")
    value = record[key]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} has {_kind(value)} under {key!r}, not a string: {_other_field(list(record))}")
    return value


def _parquet_column(path: Path, column: str) -> Iterator[tuple[Any, float]]:
    """(pyarrow string scalar, share of the file's rows it stands for) of every row."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"data file {path} is Parquet, which needs pyarrow: pip install 'heteromesh[data]', or give a .jsonl file"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"data file {path} has no column {column!r}: {_other_field(names)}")
            kind = file.schema_arrow.field(column).type
            plain = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if str(plain) not in {"string", "large_string", "string_view"}:
                raise UserError(f"data file {path} column {column!r} is {kind}, not a string: {_other_field(names)}")
            share = 1 / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    yield value, share
    except arrow.ArrowException as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"data file {path} is not readable Parquet ({reason}): mend or remove it") from None


def _other_field(names: Sequence[str]) -> str:
    return f"name another with --field (there are: {', '.join(map(repr, names)) or 'none'})"


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
