"""Where sequence lengths come from when there is no data yet: files, quantile tables, a lognormal distribution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from heteromesh.errors import UserError
from heteromesh.planner import files

DRAWS = 4096
"""Sampled at once, so that a seed gives the same lengths whatever the batches are."""
PATIENCE = 100_000
"""Lengths dropped one after another before max_length counts as a mistake."""


@dataclass(kw_only=True)
class LengthSource:
    """Lengths in order, cut into batches; `dropped` counts those above `max_length`."""

    what: str
    draw: Callable[[], Iterator[int]]
    sampled: bool
    """True: endless."""
    max_length: int | None = None
    dropped: int = field(default=0, init=False)

    def batches(self, steps: int, *, sequences: int = 0, tokens: int = 0) -> Iterator[tuple[int, ...]]:
        """Yields at most `steps` batches of `sequences` sequences, or of as many as `tokens` tokens hold (at least
        one).

        A file that ends early gives fewer batches, the last one shorter.
        """
        assert (sequences > 0) != (tokens > 0), "give a batch either sequences or tokens"
        batch: list[int] = []
        total = 0
        for length in self._kept():
            if batch and (len(batch) == sequences or (tokens and total + length > tokens)):
                yield tuple(batch)
                steps -= 1
                batch, total = [], 0
            if not steps:
                return
            batch.append(length)
            total += length
        if batch:
            yield tuple(batch)

    def _kept(self) -> Iterator[int]:
        row = 0
        for length in self.draw():
            if self.max_length is None or length <= self.max_length:
                row = 0
                yield length
                continue
            self.dropped += 1
            row += 1
            if row == PATIENCE:
                raise UserError(
                    f"max_length={self.max_length} drops nearly every length of {self.what} "
                    f"({PATIENCE} in a row): raise it"
                )


def open_lengths(spec: str, *, seed: int = 0, max_length: int | None = None) -> LengthSource:
    """Returns the source that `--lengths` names: `lognormal:MU,SIGMA,MAX`, a `.npy`, a quantile table `.json`, or a
    text file.

    Raises UserError naming file and line (or index) of what is not a length.
    """
    if spec.startswith("lognormal:"):
        return LengthSource(what=spec, draw=_lognormal(spec, seed), sampled=True, max_length=max_length)
    path = Path(spec)
    if path.suffix == ".json":
        return LengthSource(what=path.name, draw=_quantiles(path, seed), sampled=True, max_length=max_length)
    values = _npy(path) if path.suffix == ".npy" else _text(path)
    if not values:
        raise UserError(f"lengths file {path} holds no length: write one whole number of tokens a line")
    if max_length is not None and min(values) > max_length:
        raise UserError(
            f"max_length={max_length} drops every length of {path}: raise it to at least the shortest, {min(values)}"
        )
    return LengthSource(what=path.name, draw=lambda: iter(values), sampled=False, max_length=max_length)


def _text(path: Path) -> list[int]:
    values = []
    for number, line in enumerate(files.read_text(path, "lengths file").splitlines(), start=1):
        word = line.strip()
        if not word:
            continue
        if not (word.isascii() and word.isdigit()) or int(word) == 0:
            raise UserError(f"lengths file {path} line {number} is {word[:40]!r}: {_RULE}")
        values.append(int(word))
    return values


def _npy(path: Path) -> list[int]:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"lengths file {path} does not exist: check the path") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"lengths file {path} is not a .npy array ({error}): save it with numpy.save") from None
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise UserError(
            f"lengths file {path} holds a {array.ndim}-dimensional array of {array.dtype}: "
            "it must be one-dimensional, of whole numbers"
        )
    wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0) & (array == np.floor(array))))
    if wrong.size:
        index = int(wrong[0])
        raise UserError(f"lengths file {path} index {index} is {array[index]}: {_RULE}")
    return [int(n) for n in array]


_RULE = "a length is a whole number of tokens, at least 1, so correct or remove it"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """A quantile table: `percentile[i]` per cent of lengths are at most `length[i]`."""

    percentile: tuple[float, ...] = field(metadata=files.ZERO)
    length: tuple[int, ...]
    n: int | None = None
    mean: float | None = None


def _quantiles(path: Path, seed: int) -> Callable[[], Iterator[int]]:
    text = files.read_text(path, "lengths file")
    where = f"lengths file {path}"
    try:
        table = files.build(_Table, json.loads(text), where)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {error.lineno} is not JSON ({error.msg}): correct that line") from None
    points = list(zip(table.percentile, table.length, strict=False))
    rising = all(p < q and m <= n for (p, m), (q, n) in pairwise(points))
    if len(table.percentile) != len(table.length) or len(points) < 2 or not rising or points[-1][0] > 100:
        raise UserError(
            f"{where}: percentile and length must be equally long lists, two points or more, "
            f"both rising and percentile within 0 and 100 (they have {len(table.percentile)} and {len(table.length)})"
        )
    low, high = table.percentile[0], table.percentile[-1]

    def draw() -> Iterator[int]:
        rng = np.random.default_rng(seed)
        while True:
            drawn = np.interp(rng.uniform(low, high, DRAWS), table.percentile, table.length)
            yield from (int(n) for n in np.maximum(1, np.rint(drawn)))

    return draw


def _lognormal(spec: str, seed: int) -> Callable[[], Iterator[int]]:
    words = spec.removeprefix("lognormal:").split(",")
    try:
        mu, sigma, top = (float(w) for w in words)
    except ValueError:
        raise UserError(f"lengths {spec!r} is not lognormal:MU,SIGMA,MAX: give three numbers") from None
    if not all(map(math.isfinite, (mu, sigma, top))) or sigma <= 0 or top < 1 or top != math.floor(top):
        raise UserError(f"lengths {spec!r}: SIGMA must be above 0 and MAX a whole number of tokens, at least 1")
    # Redrawing must end: P(length <= MAX) of the distribution.
    kept = 0.5 * math.erfc((mu - math.log(top)) / (sigma * math.sqrt(2)))
    if kept < 0.01:
        raise UserError(f"lengths {spec!r}: MAX leaves less than 1 % of the distribution: raise MAX or lower MU")

    def draw() -> Iterator[int]:
        rng = np.random.default_rng(seed)
        while True:
            drawn = np.maximum(1, np.rint(rng.lognormal(mu, sigma, DRAWS)))
            yield from (int(n) for n in drawn[drawn <= top])

    return draw
