"""Layers that a model itself computes again in its backward know their pass there, on whatever thread."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from backwards import on_another_thread
from heteromesh.parallel.attention.scope import Scope, backward_number
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from instances import random_costs, random_lengths, random_step
from llama import Block, Llama
from ranks import World, run_ranks
from steps import TINY


class Dropping(Block):
    """With dropouts, one of them in a part that may be computed again by itself."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.drop, self.again = nn.Dropout(0.3), ""

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), cos, sin))
        if self.again == "part":
            return x + checkpoint(self._mlp, x, use_reentrant=False)
        return x + self._mlp(x)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return self.drop(self.down(nn.functional.silu(gate) * up))


class Model(Llama):
    """Computes its layers again as Transformers' gradient checkpointing does, and one layer is used twice."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.layers = nn.ModuleList(Dropping() for _ in range(3))
        self.again = ""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        assert position_ids is not None
        cos, sin = self._rope(position_ids)
        x = self.embed(input_ids)
        for layer in (*self.layers, self.layers[0]):
            layer.again = self.again
            if self.again in ("reentrant", "not reentrant"):
                x = checkpoint(layer, x, cos, sin, use_reentrant=self.again == "reentrant")
            else:
                x = layer(x, cos, sin)
        return self.head(self.norm(x))


def gradients(world: World, again: str, threaded: bool) -> list[float]:
    rng = random.Random(world.size)
    costs = random_costs(rng, world.size)
    lengths = random_lengths(rng, sum(costs.capacity) // 3)
    step = random_step(rng, lengths, world.size)
    data = [torch.randint(TINY.vocab, (n,), generator=torch.Generator().manual_seed(1)) for n in lengths]
    torch.manual_seed(1)
    model = Model()
    model.again = again
    executor = StepExecutor(model, world, seed=3)
    original = torch.Tensor.backward
    if threaded:
        torch.Tensor.backward = on_another_thread(original)  # type: ignore[method-assign]
    try:
        result = executor.run(step, Reader(data).step_inputs(step, range(len(data)), world.rank), number=2)
    finally:
        torch.Tensor.backward = original  # type: ignore[method-assign]
    norms = [float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None]
    return [result.loss, *norms]


def all_kinds(world: World) -> dict[tuple[str, bool], list[float]]:
    kinds = [(again, threaded) for again in ("reentrant", "not reentrant", "part") for threaded in (False, True)]
    return {("", False): gradients(world, "", False)} | {kind: gradients(world, *kind) for kind in kinds}


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_computed_again_give_the_same_gradients(ranks: int) -> None:
    found = run_ranks(ranks, all_kinds)[0]
    plain = found.pop(("", False))
    for kind, values in found.items():
        assert values == pytest.approx(plain, rel=1e-5), kind


def test_a_scope_holds_in_backwards_of_its_own_alone() -> None:
    scope, seen = Scope[str]("test"), []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append((scope.get(), backward_number() >= 0))
            return grad

    def loss() -> torch.Tensor:
        out: torch.Tensor = Looks.apply(torch.ones(2, requires_grad=True)).sum()  # type: ignore[no-untyped-call]
        return out

    inside, other = loss(), loss()
    with scope.holding("pass"), scope.backward_of(inside):
        for one in (inside, other):
            thread = threading.Thread(target=one.backward)
            thread.start()
            thread.join()
        loss().backward()
    assert seen == [("pass", True), (None, True), ("pass", True)]
    assert scope.get() is None
    assert backward_number() == -1
