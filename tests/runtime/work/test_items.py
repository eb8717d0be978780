"""What users give as data: padding cut off, labels of both kinds, and one sentence for what is no data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from heteromesh.errors import UserError
from heteromesh.parallel.attention.layout import layout_of
from heteromesh.planner.plan import Pass
from heteromesh.runtime.work.reader import Reader

IDS = [5, 6, 7, 8, 9, 5]
SHIFTED = [6, 7, 8, 9, 5, -100]


def read(reader: Reader, index: int) -> tuple[list[int], list[int], list[int]]:
    length = reader.lengths[index]
    plan = Pass(ranks=(0,), method="local", sequences=(0,), shards=((length,),), seconds=0.0)
    given = reader.pass_input(layout_of(plan, [length]), [index], 0)
    return given.tokens[0].tolist(), given.positions[0].tolist(), given.labels[0].tolist()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_padding_is_cut_off_at_both_ends(kind: Any) -> None:
    left = {"input_ids": [0, 0, *IDS], "labels": [-100, -100, *SHIFTED], "attention_mask": [0, 0, *[1] * 6]}
    right = {"input_ids": [*IDS, 0], "labels": [*SHIFTED, -100], "attention_mask": [*[True] * 6, False]}
    data = [{name: kind(values) for name, values in item.items()} for item in (left, right)]
    reader = Reader(data)
    assert reader.lengths == (6, 6)
    for index in range(2):
        assert read(reader, index) == (IDS, [0, 1, 2, 3, 4, 5], SHIFTED)


def test_unshifted_labels_are_shifted_after_padding_is_cut() -> None:
    item = {"input_ids": [0, *IDS], "labels": [0, -100, -100, *IDS[2:]], "attention_mask": [0, *[1] * 6]}
    assert read(Reader([item], "unshifted"), 0) == (IDS, [0, 1, 2, 3, 4, 5], [-100, 7, 8, 9, 5, -100])


def test_parts_of_a_padded_sequence_are_those_of_the_whole() -> None:
    reader = Reader([{"input_ids": [0, *IDS], "labels": [1, *SHIFTED], "attention_mask": [0, *[1] * 6]}])
    plan = Pass(ranks=(0, 1), method="ring", sequences=(0,), shards=((2,), (4,)), seconds=0.0)
    given = reader.pass_input(layout_of(plan, [6]), [0], 1)
    assert given.tokens[0].tolist() == [IDS[i] for i in given.positions[0].tolist()]
    assert given.labels[0].tolist() == [SHIFTED[i] for i in given.positions[0].tolist()]


class Endless(IterableDataset[int]):
    """Without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"input_ids": IDS}], "sequence 0 of the data has input_ids and no labels: give input_ids and labels"),
        ([IDS, {"labels": IDS}], "sequence 1 of the data has labels and no input_ids"),
        ({"train": [IDS], "test": [IDS]}, "the data is a dict with 'train', 'test': give one of its parts"),
        (DataLoader([IDS]), "the data is a DataLoader, whose batches are made already: give its dataset"),
        (Endless(), "the data is a Endless, which can't be asked for its length"),
        (iter([IDS]), "the data is a list_iterator, which can't be asked for its length"),
        (
            [{"input_ids": IDS, "labels": SHIFTED, "attention_mask": [1, 1, 0, 1, 1, 1]}],
            "zero in its attention_mask at 2",
        ),
        ([{"input_ids": IDS, "labels": SHIFTED, "attention_mask": [0] * 6}], "an attention_mask of 6 zeros: leave the"),
        ([{"input_ids": IDS, "labels": SHIFTED, "attention_mask": [1] * 5}], "6 input_ids and an attention_mask of 5"),
        ([IDS, {"input_ids": IDS, "labels": [-1, *SHIFTED[1:]]}], "sequence 1 of the data has the label -1: a label"),
        ([{"input_ids": IDS, "labels": IDS}] * 3, 'position by position.*set TrainerConfig\\(labels="unshifted"\\)'),
        ([[4], [5]], "all 2 sequences of the data have one token, and nothing to predict"),
        ([], "the data has no sequences"),
    ],
)
def test_what_is_no_data_is_told(data: Any, words: str) -> None:
    with pytest.raises(UserError, match=words if "\\" in words else None) as error:
        Reader(data)
    assert "\\" in words or words in str(error.value)


def test_shifted_labels_given_as_unshifted_are_refused() -> None:
    with pytest.raises(UserError, match='has labels="unshifted": leave that out'):
        Reader([{"input_ids": IDS, "labels": SHIFTED}], "unshifted")


def test_labels_that_only_look_alike_are_taken() -> None:
    same = [{"input_ids": [3] * 9, "labels": [3] * 8 + [-100]}, {"input_ids": IDS, "labels": SHIFTED}]
    few = [{"input_ids": IDS, "labels": [-100, -100, -100, -100, 9, -100]}]
    mixed = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": SHIFTED}]
    for data in (same, few, mixed):
        Reader(data)


def test_sequences_without_anything_to_learn_are_counted() -> None:
    facts = Reader([[3], IDS, {"input_ids": IDS, "labels": [-100] * 6}]).facts
    assert (facts.untrained, facts.sequences, facts.tokens) == (2, 3, 13)
    assert facts.warning().startswith("2 of the data's 3 sequences have no label to learn from")
    assert Reader([IDS]).facts.warning() == ""


def test_the_furthest_id_is_named() -> None:
    reader = Reader([IDS, [1, 70, 2], [60, 3]])
    assert reader.id_beyond(71) is None
    found = reader.id_beyond(60)
    assert found is not None
    assert (found.value, found.sequence) == (70, 1)
