"""What is refused of losses of the user's own, and of data for them, before the first step."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

import heteromesh as hm
from heteromesh.parallel.model.loss import LossBatch
from heteromesh.planner.plan import Pass
from heteromesh.planner.splitting.parts import divide
from heteromesh.runtime.engine.loss_check import check_loss
from heteromesh.runtime.work.examples import Example, stretched
from heteromesh.runtime.work.reader import Reader
from llama import Llama
from steps import TINY

DATA = [{"input_ids": list(range(n)), "label": n % 7} for n in (9, 30, 12)]


def by_item(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    return functional.cross_entropy(batch.last(outputs), batch["label"], reduction="none")


def mean(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    return by_item(outputs, batch).mean()


def relative(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """Items are compared with each other."""
    losses = by_item(outputs, batch)
    return losses - losses.sum() / max(1, batch.items)


def of_the_rank_alone(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """Takes what this rank has of a sequence for all of it."""
    return functional.cross_entropy(outputs, batch["labels"], reduction="none") / batch.tokens


def half(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    return batch.sum(outputs[: len(outputs) // 2])


def asks(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    return batch["labelz"]


def two(outputs: torch.Tensor, batch: LossBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return by_item(outputs, batch), torch.ones(batch.items + 1)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (mean, r"the loss returned a tensor \(\) for 9 tokens and 1 items that end here"),
        (relative, r"for two items packed, and to "),
        (of_the_rank_alone, r"for two items packed, and to "),
        (half, r"values of shape \(4, 61\) together by sequence: give one row for each of the pass's 9 tokens"),
        (asks, r"the loss asks for 'labelz', and the data has 'labels', 'label'"),
        (two, r"returned \(1,\) values and \(2,\) weights"),
    ],
)
def test_a_loss_that_depends_on_the_plan_is_refused(loss: Any, told: str) -> None:
    with pytest.raises(hm.UserError, match=told):
        check_loss(Llama(TINY), loss, Reader(DATA, examples=True))


def test_a_loss_that_treats_each_item_by_itself_is_fine() -> None:
    check_loss(Llama(TINY), by_item, Reader(DATA, examples=True))


def careless(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """Leaves `last` out where no item ends, and so does not meet its peers."""
    return by_item(outputs, batch) if batch.items else outputs.new_zeros(0)


def test_a_loss_that_brings_together_on_some_ranks_only_is_refused() -> None:
    with pytest.raises(hm.UserError, match=r"called attention 1 times and rank 1 0 times|called attention 0 times"):
        check_loss(Llama(TINY), careless, Reader(DATA, examples=True))


class Pooled(torch.nn.Module):
    """Scores of the last token only, as Transformers' heads for sequences return."""

    def __init__(self, needs_targets: bool) -> None:
        super().__init__()
        self.inner, self.forward = Llama(TINY), self.with_targets if needs_targets else self.pooled

    def pooled(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids, position_ids)[:, -1]

    def with_targets(self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids, position_ids)


@pytest.mark.parametrize(
    ("needs_targets", "told"),
    [(False, r"Pooled returned \(1, 61\) for 9 tokens in a row"), (True, "Pooled.forward needs targets")],
)
def test_a_model_without_outputs_by_token_is_refused(needs_targets: bool, told: str) -> None:
    with pytest.raises(hm.UserError, match=told):
        check_loss(Pooled(needs_targets), by_item, Reader(DATA, examples=True))


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ([{"input_ids": [1, 2], "label": 1}, {"input_ids": [1, 2]}], "item 1 of the data has 1 sequences and the"),
        ([{"input_ids": [[1], [2]]}, {"input_ids": [1, 2]}], "item 1 of the data has 1 sequences"),
        ([{"input_ids": [1], "x": [1, 2, 3]}, {"input_ids": [1], "x": [1, 2]}], r"x is of several shapes, such as \(2"),
        ([{"input_ids": [1, 2], "x": [1]}, {"input_ids": [1], "x": [1]}, {"input_ids": [3], "x": [[1]]}], "x is of"),
        ([{"input_ids": [1], "x": "red"}], "has a x that is no array of numbers"),
        ([{"input_ids": [[1, 2], torch.arange(0)]}], "a sequence without tokens"),
        ([{"input_ids": [[1, 2], [3]], "attention_mask": [1, 1]}], "has 2 sequences and 1 masks"),
        ([{"label": 3}], "item 0 of the data has label and no input_ids"),
        ([], "the data has no items"),
    ],
)
def test_data_of_no_form_is_refused(items: list[Any], told: str) -> None:
    with pytest.raises(hm.UserError, match=told):
        Reader(items, examples=True)


def test_fields_go_with_the_tokens_of_each_rank() -> None:
    pair = {
        "input_ids": [[5, 6, 7, 8, 0], [1, 2]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1]],
        "labels": [[5, 6, 7, 8, -100], [1, 2]],
        "w": [[0.1, 0.2, 0.3, 0.4, 9.0], torch.tensor([0.5, 0.6])],
        "reference": [3.0, 4.0],
    }
    reader = Reader([pair, pair], "unshifted", examples=True)
    assert reader.lengths == (6, 6)
    plan = Pass(ranks=(0, 1), method="ulysses", sequences=(0, 1), shards=((3, 4), (3, 2)), seconds=0.0)
    examples = reader.shortest_examples()
    seen = [reader.example_input(plan, examples, rank) for rank in (0, 1)]
    assert [x.tokens.tolist() for x in seen] == [[[5, 6, 1, 5, 6, 7, 1]], [[7, 8, 2, 8, 2]]]
    assert [x.positions.tolist() for x in seen] == [[[0, 1, 0, 0, 1, 2, 0]], [[2, 3, 1, 3, 1]]]
    assert [x.fields["labels"].tolist() for x in seen] == [[6, 7, 2, 6, 7, 8, 2], [8, -100, -100, -100, -100]]
    assert seen[1].fields["w"].tolist() == pytest.approx([0.3, 0.4, 0.6, 0.4, 0.6])
    assert [x.fields["reference"].tolist() for x in seen] == [[], [[3, 4], [3, 4]]], "both end on rank 1"
    assert [x.starts for x in seen] == [(0, 4, 0, 4)] * 2


@pytest.mark.parametrize("seed", range(20))
def test_ranks_keep_their_tokens_when_units_are_divided(seed: int) -> None:
    random = np.random.RandomState(seed)
    parts = [tuple(int(n) for n in random.randint(1, 40, 3)) for _ in range(4)]
    rows = []
    for lengths in parts:
        cuts = sorted(random.randint(0, sum(lengths) + 1, 2))
        rows.append(np.diff([0, *cuts, sum(lengths)]))
    shards = tuple(tuple(int(row[i]) for row in rows) for i in range(3))
    plan = Pass(ranks=(0, 1, 2), method="gather", sequences=(2, 0, 3, 1), shards=shards, seconds=0.0)
    divided, lengths = divide(plan, parts)
    assert lengths == [n for row in parts for n in row]
    assert divided.sequences == (2, 2, 2, 0, 0, 0, 3, 3, 3, 1, 1, 1)
    table = np.array(divided.shards)
    assert (table >= 0).all()
    assert table.sum(0).tolist() == lengths
    assert table.reshape(3, 4, 3).sum(2).tolist() == [list(row) for row in shards]


def test_a_stretched_item_has_the_length_asked_for_and_its_own_values() -> None:
    example = Example((np.arange(3), np.arange(10, 12)), {"w": (np.ones((3, 2)), np.zeros((2, 2)))}, {"x": np.array(7)})
    longer = stretched(example, 9)
    assert [row.tolist() for row in longer.ids] == [[0, 1, 2, 0], [10, 11, 10, 11, 10]]
    assert [row.shape for row in longer.by_token["w"]] == [(4, 2), (5, 2)]
    assert longer.by_item is example.by_item
