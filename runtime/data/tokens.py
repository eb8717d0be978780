"""The token store: a whole corpus as token ids in one memory-mapped file, built once per machine.

File: token ids | zeros to a multiple of 8 | offsets (sequences + 1, int64) | footer (JSON) | trailer. Little-endian.
The trailer comes last, so a file cut short anywhere is seen as damaged, and is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from heteromesh.errors import UserError
from heteromesh.runtime.data.documents import Corpus, DocumentReader, Report
from heteromesh.runtime.data.tokenizer import TokenIds, Tokenizer

MIN_LENGTH = 2
"""Tokens a sequence needs to have a target."""
MIN_MAX_LENGTH = 3
"""An odd document can't be cut into pieces of exactly two tokens."""
_FORMAT = 1
_TRAILER = struct.Struct("<QQ8s")  # footer bytes, footer crc, magic
_MAGIC = b"HMTOKEN1"
_VERIFY_BYTES = 1 << 30  # above this, opening checks everything but the ids themselves (crc: 6 GB/s measured)
_BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once: enough for its threads, little memory
_PROGRESS_SECONDS = 0.1
_TOO_SHORT = f"shorter than {MIN_LENGTH} tokens"
log = logging.getLogger(__name__)
Int64s: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a build is."""

    fraction: float
    """Share of the source read, 0 to 1."""
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Footer:
    source: str
    tokenizer: str
    vocab_size: int
    max_length: int
    dtype: str
    tokens: int
    sequences: int
    fingerprint: str
    token_crc: int
    offset_crc: int
    report: Report


class TokenStore:
    """Sequences of token ids, read-only. Made by `open_tokens`; opening an existing store reads no ids up front.

    Sequence i is a document, or a piece of at most `max_length` consecutive tokens of one; pieces keep their order.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when there is no such file, ValueError when it is damaged."""
        data = np.memmap(path, dtype=np.uint8, mode="r")
        footer, body = _read_footer(data)
        self._footer = footer
        self.vocab_size, self.report = footer.vocab_size, footer.report
        self.fingerprint = footer.fingerprint
        """Equal on two machines exactly when they hold the same sequences."""
        dtype = np.dtype(footer.dtype)
        token_bytes, offset_start, end = _layout(footer.tokens, footer.sequences, dtype)
        if end != body:
            raise ValueError(f"{body} bytes of data where {end} were written")
        if zlib.crc32(data[offset_start:end].data) != footer.offset_crc:
            raise ValueError("offsets changed")
        if token_bytes <= _VERIFY_BYTES and zlib.crc32(data[:token_bytes].data) != footer.token_crc:
            raise ValueError("token ids changed")
        self._tokens = data[:token_bytes].view(dtype)
        self._offsets: Int64s = np.array(data[offset_start:end].view("<i8"), dtype=np.int64)
        self.lengths: Int64s = np.diff(self._offsets)
        """Tokens per sequence, shape (sequences,), each at least 2."""
        self.lengths.flags.writeable = False

    def __len__(self) -> int:
        return self._footer.sequences

    def __getitem__(self, index: int) -> Int64s:
        return self.sequence(index)

    def sequence(self, index: int) -> Int64s:
        """All ids of a sequence, shape (lengths[index],); raises IndexError outside [0, len)."""
        self._check(index)
        return self._copy(int(self._offsets[index]), int(self._offsets[index + 1]))

    def slice(self, index: int, start: int, end: int) -> Int64s:
        """Ids [start, end) of a sequence, shape (end - start,): one rank's shard, without reading the rest.

        Raises IndexError unless 0 <= start <= end <= lengths[index].
        """
        self._check(index)
        if not 0 <= start <= end <= self.lengths[index]:
            raise IndexError(f"tokens {start}:{end} of sequence {index}, which has {self.lengths[index]}")
        first = int(self._offsets[index])
        return self._copy(first + start, first + end)

    def describe(self) -> str:
        """One paragraph: documents, sequences, tokens, lengths and how heavy their tail is."""
        footer, lengths = self._footer, np.sort(self.lengths)
        q = [int(v) for v in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1], method="nearest")]
        longest = max(1, round(0.15 * lengths.size))
        share = lengths[-longest:].sum() / footer.tokens
        return (
            f"{footer.source}: {footer.report.describe()}; {footer.sequences} sequences of at most {footer.max_length} "
            f"tokens, {footer.tokens} tokens ({footer.tokenizer}, vocabulary {footer.vocab_size}). "
            f"Lengths: min {q[0]}, 25 % {q[1]}, median {q[2]}, 75 % {q[3]}, 95 % {q[4]}, max {q[5]}; "
            f"the longest 15 % of the sequences hold {100 * share:.0f} % of the tokens."
        )

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")

    def _copy(self, first: int, last: int) -> Int64s:
        return np.array(self._tokens[first:last], dtype=np.int64)


def open_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    cache_dir: str | Path,
    progress: Callable[[Progress], None] | None = None,
) -> TokenStore:
    """The corpus' tokens: from `cache_dir` where they are there and whole, else built there first.

    Documents longer than `max_length` tokens are cut into consecutive sequences; nothing is lost. Documents of
    fewer than 2 tokens are skipped and counted. Any number of processes may call this at once: one builds, the others
    wait for it. `progress` is called a few times a second while building. Raises UserError for a max_length below 3, a
    corpus without a usable document, and a cache directory that is full, not writable or without file locks.
    """
    if max_length < MIN_MAX_LENGTH:
        raise UserError(f"max_length {max_length} is below {MIN_MAX_LENGTH}: give at least {MIN_MAX_LENGTH} tokens")
    directory = Path(cache_dir).expanduser()
    path = directory / f"{_key(corpus, tokenizer, max_length)}.tokens"
    with _as_user_error(directory):
        store = _open_if_whole(path)
        if store is not None:
            return store
        directory.mkdir(parents=True, exist_ok=True)
        while store is None:
            with _locked(path.with_suffix(".part")) as part:
                store = _open_if_whole(path)  # another process may have built it while this one waited
                if part is not None and store is None:
                    _remove_leftovers(directory)
                    _build(part, corpus, tokenizer, max_length, progress)
                    path.with_suffix(".part").replace(path)
                    store = TokenStore(path)
    return store


def cut(length: int, max_length: int) -> list[int]:
    """Lengths of the consecutive pieces of a document: at most max_length each, none of 1 token; they sum to length."""
    pieces = [max_length] * (length // max_length)
    rest = length % max_length
    if rest == 1 and pieces:
        pieces[-1] -= 1
        rest = 2
    return [*pieces, rest] if rest else pieces


def _key(corpus: Corpus, tokenizer: Tokenizer, max_length: int) -> str:
    parts = (_FORMAT, corpus.fingerprint, tokenizer.fingerprint, tokenizer.vocab_size, max_length)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _layout(tokens: int, sequences: int, dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """Where, in bytes from the start, the ids end, the offsets start and the offsets end."""
    token_bytes = tokens * dtype.itemsize
    start = -(-token_bytes // 8) * 8
    return token_bytes, start, start + 8 * (sequences + 1)


def _read_footer(data: npt.NDArray[np.uint8]) -> tuple[_Footer, int]:
    """The footer, and how many bytes lie before it; raises ValueError where there is none."""
    if data.size < _TRAILER.size:
        raise ValueError("too short")
    size, crc, magic = _TRAILER.unpack(data[-_TRAILER.size :].tobytes())
    start = data.size - _TRAILER.size - size
    if magic != _MAGIC or start < 0:
        raise ValueError("no trailer")
    text = data[start : start + size].tobytes()
    if zlib.crc32(text) != crc:
        raise ValueError("footer changed")
    raw = json.loads(text)
    return _Footer(**{**raw, "report": Report(**raw["report"])}), start


def _open_if_whole(path: Path) -> TokenStore | None:
    try:
        return TokenStore(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("token cache %s is damaged (%s): building it again", path, error)
        return None


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO | None]:
    """An empty, exclusively locked file at `path`, removed on the way out unless renamed; waits for its holder.

    None where the holder renamed or removed the file meanwhile: look again. The kernel drops the lock of a process that
    dies, so a leftover file never blocks anybody.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=1 << 20) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _same_file(path, file):
            yield None
            return
        try:
            file.truncate(0)
            yield file
        finally:
            if _same_file(path, file):
                path.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child still has the file


def _same_file(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_leftovers(directory: Path) -> None:
    """Part files of builds that were killed: those that nobody holds a lock on."""
    for path in directory.glob("*.part"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(path, file):  # not one that another builder has begun since
                path.unlink()


@contextmanager
def _as_user_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"token cache directory {directory} can't be used ({error.strerror or error}): "
            f"make room there or name another directory"
        ) from None


class _Writer:
    """Appends documents to a token file, then its offsets and footer."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, max_length: int) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
        self._offsets = array("q", [0])
        self._token_crc = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self.documents = self.too_short = 0

    @property
    def tokens(self) -> int:
        return self._offsets[-1]

    def add(self, ids: TokenIds) -> None:
        if ids.size < MIN_LENGTH:
            self.too_short += 1
            return
        size = self._tokenizer.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise UserError(
                f"tokenizer {self._tokenizer.name} gave token id {low if low < 0 else high}, ids must be in "
                f"[0, {size}): fix its vocab_size"
            )
        data = memoryview(ids.astype(self._dtype, copy=False).tobytes())
        self._file.write(data)
        self._digest.update(data)
        self._token_crc = zlib.crc32(data, self._token_crc)
        self.documents += 1
        for piece in cut(ids.size, self._max_length):
            self._offsets.append(self._offsets[-1] + piece)

    def finish(self, source: str, report: Report) -> None:
        """Writes what follows the ids, and has the disk keep it."""
        offsets = np.frombuffer(self._offsets, dtype=np.int64).astype("<i8").tobytes()
        sequences = len(self._offsets) - 1
        token_bytes, start, _ = _layout(self.tokens, sequences, self._dtype)
        self._digest.update(offsets)
        footer = _Footer(
            source=source,
            tokenizer=self._tokenizer.name,
            vocab_size=self._tokenizer.vocab_size,
            max_length=self._max_length,
            dtype=self._dtype.str,
            tokens=self.tokens,
            sequences=sequences,
            fingerprint=self._digest.hexdigest(),
            token_crc=self._token_crc,
            offset_crc=zlib.crc32(offsets),
            report=report,
        )
        text = json.dumps(asdict(footer)).encode()
        trailer = _TRAILER.pack(len(text), zlib.crc32(text), _MAGIC)
        self._file.write(b"\0" * (start - token_bytes) + offsets + text + trailer)
        self._file.flush()
        os.fsync(self._file.fileno())  # else a power cut could leave a renamed file of zeros


def _build(
    file: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, max_length: int, progress: Callable[[Progress], None] | None
) -> None:
    reader, writer, shown = corpus.read(), _Writer(file, tokenizer, max_length), time.monotonic()
    for texts in _batches(reader):
        for ids in tokenizer.encode_batch(texts):
            writer.add(ids)
        if progress and time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            progress(Progress(fraction=reader.fraction, documents=writer.documents, tokens=writer.tokens))
    report = reader.report
    if writer.too_short:
        skipped = {**report.skipped, _TOO_SHORT: writer.too_short}
        report = Report(documents=writer.documents, bytes=report.bytes, skipped=skipped)
    if not writer.documents:
        raise UserError(f"data source {corpus.name} gave {report.describe()}: name a source of longer documents")
    writer.finish(corpus.name, report)
    if progress:
        progress(Progress(fraction=1.0, documents=writer.documents, tokens=writer.tokens))


def _batches(reader: DocumentReader) -> Iterator[list[str]]:
    """Documents in lists of about a million characters."""
    texts: list[str] = []
    size = 0
    for text in reader:
        texts.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
