"""Text to token ids and back: bytes by default, or a Hugging Face `tokenizers` JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from heteromesh.errors import UserError

BYTES = "bytes"
TokenIds: TypeAlias = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """What the token store asks of a tokenizer. Ids are in [0, vocab_size)."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they turn every text into the same ids."""

    def encode(self, text: str) -> TokenIds:
        """All ids of a document, its special tokens included, shape (tokens,)."""

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """`encode` of each, on several cores where the tokenizer can."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids, without special tokens; a cut character becomes U+FFFD."""


class ByteTokenizer:
    """UTF-8 bytes (ids 0-255) between a begin (256) and an end (257) token."""

    BEGIN = 256
    END = 257

    name = BYTES
    vocab_size = 258
    fingerprint = "bytes-1"

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Ids, shape (2 + UTF-8 bytes,). Raises UnicodeEncodeError for a lone surrogate, which has no UTF-8."""
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        ids = np.empty(data.size + 2, dtype=np.uint16)
        ids[0], ids[-1], ids[1:-1] = self.BEGIN, self.END, data
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: npt.ArrayLike) -> str:
        values = np.asarray(ids, dtype=np.int64)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer saved as `tokenizer.json` by the Hugging Face `tokenizers` library.

    Truncation and padding written in the file are switched off: sequences keep their natural length.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file is missing or no tokenizer, or the library is not installed."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer file {path} can't be read ({error.strerror}): name a tokenizer.json, or {BYTES!r}"
            ) from None
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise UserError(
                f"tokenizer file {path} needs the tokenizers library: pip install 'heteromesh[data]', or use {BYTES!r}"
            ) from None
        try:
            self._backend = Backend.from_buffer(data)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(
                f"tokenizer file {path} is not a tokenizers JSON file ({error}): save it with Tokenizer.save, "
                f"or use {BYTES!r}"
            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name = path.name
        # ids may have holes, so the number of entries is not the size an embedding needs
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise UserError(f"tokenizer file {path} has an empty vocabulary: train it first, or use {BYTES!r}")
        self.fingerprint = "hf-" + hashlib.blake2b(data, digest_size=16).hexdigest()

    def encode(self, text: str) -> TokenIds:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        # "fast" leaves out the character offsets, which nothing here reads: twice the speed
        return [np.asarray(e.ids, dtype=np.uint32) for e in self._backend.encode_batch_fast(list(texts))]

    def decode(self, ids: npt.ArrayLike) -> str:
        return str(self._backend.decode(np.asarray(ids, dtype=np.int64).tolist()))


def load_tokenizer(spec: str | Path = BYTES) -> Tokenizer:
    """`bytes`, or the path of a Hugging Face `tokenizers` JSON file; raises UserError when that can't be loaded."""
    return ByteTokenizer() if str(spec) == BYTES else HuggingFaceTokenizer(Path(spec).expanduser())
