"""Trials leave a model as it was, and buffers that passes change are the same on all ranks after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heteromesh.parallel.model.pass_buffers import PassBuffers
from heteromesh.parallel.model.undisturbed import undisturbed
from llama import Block, Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA, make_trainer


class Counting(Block):
    """A block that counts its tokens, by their kind and in all ways that modules have."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("load", torch.zeros(4), persistent=False)
        self.register_buffer("average", torch.zeros(1, 8))
        self.seen = 0

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        self.tokens += x.shape[1]
        self.load = self.load + torch.bincount(x[0, :, :4].detach().argmax(-1), minlength=4)
        self.average.mul_(0.9).add_(0.1 * x[0, :, :8].detach().mean(0))
        self.seen += x.shape[1]
        return super().forward(x, cos, sin)


class Counter(Llama):
    def __init__(self) -> None:
        super().__init__(TINY)
        self.layers = nn.ModuleList(Counting() for _ in range(2))


def test_buffers_attributes_and_generators_are_put_back() -> None:
    model, x = Counter(), torch.arange(9)[None]
    model.register_buffer("cells", torch.zeros(3, 1).expand(3, 4))
    model(x)
    layer = model.layers[0]
    kept, state = layer.load, torch.get_rng_state()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with undisturbed(model):
        model.eval()(x)
        model.cells[:, :1].add_(1)
        layer.register_buffer("late", torch.rand(3))
        layer.cache = [1]
        assert layer.seen == 18
    assert layer.load is kept
    assert layer.seen == 9
    assert layer.training
    assert not hasattr(layer, "late")
    assert not hasattr(layer, "cache")
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: b.tolist() for n, b in model.named_buffers()} == {n: b.tolist() for n, b in before.items()}


def test_sums_and_other_buffers_are_told_apart() -> None:
    model, x = Counter(), torch.arange(9)[None]
    buffers = PassBuffers(model)
    buffers.learn(lambda: model(x))
    assert buffers.summed == {f"layers.{i}.{name}" for i in range(2) for name in ("tokens", "load")}
    assert buffers.followed == {f"layers.{i}.average" for i in range(2)}
    assert int(model.layers[0].tokens) == 0


def test_what_passes_did_that_do_not_count_is_undone() -> None:
    model, x = Counter(), torch.arange(9)[None]
    buffers = PassBuffers(model)
    buffers.learn(lambda: model(x))
    before = {n: b.clone() for n, b in model.named_buffers()}
    buffers.begin()
    model(x)
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())
    buffers.undo()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def counted(world: World, folder: Path, changes: dict[str, Any]) -> tuple[list[int], list[float], list[float], int]:
    torch.manual_seed(7)
    model = Counter()
    make_trainer(folder, model, max_steps=3, **changes).fit()
    tokens = [int(layer.tokens) for layer in model.layers]
    return tokens, model.layers[1].load.tolist(), model.layers[1].average.flatten().tolist(), model.layers[0].seen


@pytest.mark.parametrize("changes", [{}, {"checkpoint_activations": True}, {"compare_batches": 1}])
def test_counters_have_the_tokens_of_all_ranks_and_of_training_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    alone = run_ranks(1, counted, tmp_path / "1", changes)[0]
    assert alone[0] == [alone[3]] * 2, "every forward of training, and no other, was counted"
    assert sum(alone[1]) == alone[0][1]
    several = run_ranks(2, counted, tmp_path / "2", changes)
    assert several[0][:3] == several[1][:3]
    assert several[0][0] == alone[0]
    assert sum(several[0][1]) == sum(alone[1])
    if not changes:
        assert sum(row[3] for row in several) == alone[3]


def test_what_is_counted_is_what_is_trained(tmp_path: Path) -> None:
    sampler = make_trainer(tmp_path / "x").sampler
    tokens = sum(sampler.next_batch().tokens for _ in range(3))
    assert run_ranks(1, counted, tmp_path / "y", {})[0][0] == [tokens] * 2
    assert tokens < sum(map(len, DATA))
