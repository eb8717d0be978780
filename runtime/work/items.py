"""What users give as data: one sequence as rows of ids and of labels, and what all of them show before the first
step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from heteromesh.errors import UserError
from heteromesh.parallel.model.call import IGNORED

Row = np.ndarray[Any, np.dtype[np.int64]]
Labels = Literal["shifted", "unshifted"]
_TOLD_APART = 4
"""Labels that must agree before they are taken for the input's own."""


class Item(NamedTuple):
    """A sequence: ids (n,) and, for each, the id to predict or IGNORED."""

    ids: Row
    targets: Row


class Extreme(NamedTuple):
    """A value and the sequence that it is in."""

    value: int
    sequence: int


@dataclass(slots=True)
class DataFacts:
    """What a whole data set has."""

    ids: list[Extreme] = field(default_factory=list)
    """The smallest and the largest; [] where nobody has looked."""
    targets: list[Extreme] = field(default_factory=list)
    """The smallest and the largest of those that are not IGNORED."""
    untrained: int = 0
    """Sequences without anything to predict."""
    sequences: int = 0
    tokens: int = 0

    def warning(self) -> str:
        """Returns a sentence where nothing, or not all, can be learned from the data; else ""."""
        if not self.untrained:
            return ""
        return (
            f"{self.untrained:,} of the data's {self.sequences:,} sequences have no label to learn from (all are "
            f"{IGNORED}, or they have one token): they are passed through the model and add nothing to loss and "
            "gradients"
        )


def check_data(data: Any) -> None:
    """Raises UserError for what is no sequence of sequences."""
    kind = type(data).__name__
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, list(data)[:4]))
        first = next(iter(data), "train")
        raise UserError(f"the data is a {kind} with {names}: give one of its parts, as data[{first!r}]")
    if isinstance(data, DataLoader):
        raise UserError(
            f"the data is a {kind}, whose batches are made already: give its dataset (loader.dataset), as the Trainer "
            "chooses the sequences of each step itself"
        )
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UserError(
            f"the data is a {kind}, which can't be asked for its length and its i-th sequence: give list(data), or "
            "write it into a token store (heteromesh.runtime.data.tokens.open_tokens) where it does not fit memory"
        )


def item_of(given: Any, index: int, labels: Labels) -> Item:
    """Returns the `index`-th sequence of the data. Raises UserError for what is none.

    given: a row of ids, or a mapping with `input_ids`, `labels` and, where there is padding, `attention_mask`, whose
    padded ends are cut off.
    """
    if not isinstance(given, Mapping):
        ids = whole_numbers(given, index)
        return Item(ids, next_ids(ids))
    for name in ("input_ids", "labels"):
        if name not in given:
            raise UserError(
                f"sequence {index} of the data has {', '.join(map(str, given)) or 'nothing'} and no {name}: give "
                f"input_ids and "
                "labels, or the row of token ids alone, whose labels are its next tokens"
            )
    ids, targets = whole_numbers(given["input_ids"], index), whole_numbers(given["labels"], index)
    if len(ids) != len(targets):
        raise UserError(
            f"sequence {index} of the data has {len(ids)} input_ids and {len(targets)} labels: "
            f"give one label a token, {IGNORED} where there is nothing to predict"
        )
    if given.get("attention_mask") is not None:
        kept = kept_by_mask(whole_numbers(given["attention_mask"], index), len(ids), index)
        ids, targets = ids[kept], targets[kept]
    return Item(ids, next_ids(targets) if labels == "unshifted" else targets)


def look_at(items: Iterable[Any], labels: Labels) -> tuple[tuple[int, ...], DataFacts]:
    """Goes through all sequences once; returns their lengths and what they have.

    Raises UserError for one that is none, for labels that are no ids, and where all labels are of the other kind.
    """
    facts, lengths = DataFacts(), []
    labelled, other = 0, 0
    for index, given in enumerate(items):
        ids, targets = item = item_of(given, index, labels)
        lengths.append(len(ids))
        trained = targets[targets != IGNORED]
        widen(facts.ids, ids, index)
        widen(facts.targets, trained, index)
        facts.untrained += not len(trained)
        if isinstance(given, Mapping) and len(trained):
            labelled += 1
            other += _is_other_kind(item, labels)
    facts.sequences, facts.tokens = len(lengths), sum(lengths)
    if facts.ids and facts.ids[0].value < 0:
        low = facts.ids[0]
        raise UserError(
            f"sequence {low.sequence} of the data has the token id {low.value}: ids are 0 or more, and padding is left "
            "out, or given as zeros of an attention_mask"
        )
    if facts.targets and facts.targets[0].value < 0:
        low = facts.targets[0]
        raise UserError(
            f"sequence {low.sequence} of the data has the label {low.value}: a label is a token id, or {IGNORED} where "
            "there is nothing to predict"
        )
    if labelled and other == labelled:
        raise UserError(_OTHER_KIND[labels])
    if max(lengths, default=0) == 1 and facts.untrained == len(lengths):
        raise UserError(
            f"all {len(lengths)} sequences of the data have one token, and nothing to predict: give sequences of two "
            "tokens or more, or labels"
        )
    return tuple(lengths), facts


_OTHER_KIND = {
    "shifted": (
        "the data's labels equal its input_ids position by position, as Transformers' own models take them, so each "
        "token "
        'would learn to predict itself: set TrainerConfig(labels="unshifted"), or shift them by one (labels[i] = '
        f"input_ids[i + 1], the last one {IGNORED})"
    ),
    "unshifted": (
        "the data's labels equal the input_ids of the next position, so they are shifted already and TrainerConfig has "
        'labels="unshifted": leave that out'
    ),
}


def _is_other_kind(item: Item, labels: Labels) -> bool:
    """Whether the labels are those of the other setting: what is predicted is the token itself, or the one after
    next."""
    ids, targets = item
    own, right = (ids, next_ids(ids)) if labels == "shifted" else (next_ids(next_ids(ids)), next_ids(ids))
    seen = targets != IGNORED
    if labels == "unshifted":
        seen = seen & (own != IGNORED)
    count = int(seen.sum())
    return count >= _TOLD_APART and bool((targets == own)[seen].all()) and not bool((targets == right)[seen].all())


def kept_by_mask(mask: Row, length: int, index: int) -> slice:
    """Returns what of a sequence an attention mask leaves. Raises UserError where that is not one piece."""
    if len(mask) != length:
        raise UserError(
            f"sequence {index} of the data has {length} input_ids and an attention_mask of {len(mask)}: "
            "give one number a token"
        )
    seen = np.flatnonzero(mask)
    if not len(seen):
        raise UserError(f"sequence {index} of the data has an attention_mask of {length} zeros: leave the sequence out")
    first, end = int(seen[0]), int(seen[-1]) + 1
    if len(seen) != end - first:
        hole = first + int(np.flatnonzero(mask[first:end] == 0)[0])
        raise UserError(
            f"sequence {index} of the data has a zero in its attention_mask at {hole}, between ones: padding may be at "
            "its ends only; leave those tokens out, or set their labels to -100 where others may see them"
        )
    return slice(first, end)


def widen(found: list[Extreme], values: Row, index: int) -> None:
    """Has `found` tell of these values too."""
    if not len(values):
        return
    low, high = int(values.min()), int(values.max())
    if not found:
        found[:] = [Extreme(low, index), Extreme(high, index)]
    if low < found[0].value:
        found[0] = Extreme(low, index)
    if high > found[1].value:
        found[1] = Extreme(high, index)


def next_ids(row: Row) -> Row:
    """Returns for each token the one after it, IGNORED for the last."""
    return np.append(row[1:], IGNORED) if len(row) else row


def whole_numbers(values: Any, index: int) -> Row:
    """Returns a row of ids. Raises UserError, naming the sequence of the data, for what is none."""
    array = np.asarray(values)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise UserError(
            f"sequence {index} of the data is {array.dtype} of shape {array.shape}: "
            "a sequence is one row of whole numbers, the token ids"
        )
    return array.astype(np.int64)
