"""Items of data for a loss of the user's own: one sequence or several, and what the loss is to know of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from heteromesh.errors import UserError
from heteromesh.runtime.work.items import DataFacts, Labels, Row, kept_by_mask, next_ids, whole_numbers, widen

Array = np.ndarray[Any, Any]
_OWN = ("input_ids", "attention_mask")


class Example(NamedTuple):
    """An item of the data."""

    ids: tuple[Row, ...]
    """Of each of its sequences."""
    by_token: Mapping[str, tuple[Array, ...]]
    """Fields with a row for each token, by sequence."""
    by_item: Mapping[str, Array]
    """Any others."""


@dataclass(frozen=True, slots=True)
class ExampleForm:
    """What all items of a data set have in common."""

    parts: int = 1
    """Sequences of an item."""
    by_token: frozenset[str] = frozenset(("labels",))
    """Fields that have a row for each token in every item."""


def look_at_examples(items: Iterable[Any], labels: Labels) -> tuple[tuple[int, ...], DataFacts, ExampleForm]:
    """Goes through all items once; returns their lengths (of all sequences together), their ids and their form.

    Raises UserError for one that is none, or that is of another form than the first.
    """
    facts, lengths, first = DataFacts(), [], None
    by_token = frozenset[str]()
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for index, given in enumerate(items):
        rows, fields = _rows(given, index), _fields(given)
        form = len(rows), tuple(sorted(fields))
        found = frozenset(name for name, value in fields.items() if _by_token(value, rows) is not None)
        first, by_token = (form, found) if first is None else (first, by_token & found)
        if form != first:
            raise UserError(
                f"item {index} of the data has {_told(form)} and item 0 has {_told(first)}: with a loss of your own "
                "all items have the same form"
            )
        for name, value in fields.items():
            ragged = len(rows) > 1 and name in found
            shapes.setdefault(name, set()).add((-1,) if ragged else _array(value, name, index).shape)
        kept = [row[cut] for row, cut in zip(rows, _cuts(given, rows, index), strict=True)]
        lengths.append(sum(map(len, kept)))
        for row in kept:
            widen(facts.ids, row, index)
    if first is None:
        raise UserError("the data has no items: give at least one")
    for name, seen in shapes.items():
        if len(seen) > 1 and name not in by_token:
            raise UserError(
                f"the data's {name} is of several shapes, such as {' and '.join(map(str, sorted(seen)[:2]))}: give one "
                "row a token in every item, or the same shape in every item"
            )
    facts.sequences, facts.tokens = len(lengths), sum(lengths)
    return tuple(lengths), facts, ExampleForm(first[0], by_token | ({"labels"} - set(first[1])))


def example_of(given: Any, index: int, labels: Labels, form: ExampleForm) -> Example:
    """Returns the `index`-th item of the data. Raises UserError for what is none.

    given: a row of ids, or a mapping with `input_ids` (a row, or a list of rows: the item's sequences), perhaps
    `attention_mask`, and any other fields. Where there are no `labels` they are the next tokens.
    """
    rows, fields = _rows(given, index), _fields(given)
    cuts = _cuts(given, rows, index)
    ids = tuple(row[cut] for row, cut in zip(rows, cuts, strict=True))
    by_token: dict[str, tuple[Array, ...]] = {}
    for name in sorted(form.by_token & fields.keys()):
        split = _by_token(fields[name], rows)
        assert split is not None
        by_token[name] = tuple(_array(value[cut], name, index) for value, cut in zip(split, cuts, strict=True))
    if "labels" not in fields:
        by_token["labels"] = tuple(map(next_ids, ids))
    elif labels == "unshifted" and "labels" in by_token:
        by_token["labels"] = tuple(map(next_ids, by_token["labels"]))
    by_item = {name: _array(value, name, index) for name, value in fields.items() if name not in by_token}
    return Example(ids, by_token, by_item)


def stretched(example: Example, length: int) -> Example:
    """Returns an item of `length` tokens: each sequence repeated, or cut, to an even share of them."""
    count = len(example.ids)
    sizes = [length * (k + 1) // count - length * k // count for k in range(count)]

    def resized(rows: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(row[np.arange(size) % len(row)] for row, size in zip(rows, sizes, strict=True))

    return Example(resized(example.ids), {n: resized(v) for n, v in example.by_token.items()}, example.by_item)


def _rows(given: Any, index: int) -> list[Row]:
    ids = given
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise UserError(f"item {index} of the data has {', '.join(map(str, given)) or 'nothing'} and no input_ids")
        ids = given["input_ids"]
    several = len(ids) > 0 and np.ndim(ids[0]) == 1
    rows = [whole_numbers(row, index) for row in (ids if several else [ids])]
    if not all(map(len, rows)):
        raise UserError(f"item {index} of the data has a sequence without tokens: leave it out")
    return rows


def _fields(given: Any) -> Mapping[str, Any]:
    return {str(k): v for k, v in given.items() if k not in _OWN} if isinstance(given, Mapping) else {}


def _told(form: tuple[int, tuple[str, ...]]) -> str:
    return f"{form[0]} sequences and the fields {', '.join(form[1]) or 'none'}"


def _cuts(given: Any, rows: Sequence[Row], index: int) -> list[slice]:
    """Returns what is left of each row without its padding."""
    if not isinstance(given, Mapping) or given.get("attention_mask") is None:
        return [slice(None)] * len(rows)
    masks = _rows({"input_ids": given["attention_mask"]}, index)
    if len(masks) != len(rows):
        raise UserError(f"item {index} of the data has {len(rows)} sequences and {len(masks)} masks: give one for each")
    return [kept_by_mask(mask, len(row), index) for mask, row in zip(masks, rows, strict=True)]


def _by_token(value: Any, rows: Sequence[Row]) -> list[Array] | None:
    """Returns a field as one array a sequence, where it has a row for each token."""
    split = [value] if len(rows) == 1 else list(value) if _size(value) == len(rows) else []
    return [np.asarray(v) for v in split] if [_size(v) for v in split] == [len(row) for row in rows] else None


def _size(value: Any) -> int:
    try:
        return len(value)
    except TypeError:  # numbers, also as arrays and tensors
        return 0


def _array(value: Any, name: str, index: int) -> Array:
    """Returns a field's value in the kind of number that torch has by default."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise UserError(
            f"item {index} of the data has a {name} that is no array of numbers: a loss gets numbers only, so leave it "
            "out"
        )
    return array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
