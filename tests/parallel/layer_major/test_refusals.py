"""Models that can't be trained layer by layer are refused before the first step, in a sentence that names the layer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.initial.weights import InitialWeights
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.engine.layer_major import LayerMajor
from heteromesh.runtime.training.layer_trial import try_layers
from heteromesh.runtime.work.reader import Reader
from layer_steps import CPU, both_orders
from llama import Block, Llama
from steps import TINY


class Cache:
    """Something that layers are given and that is neither a tensor nor a mapping."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []


class Odd(Llama):
    """Does one thing that can't be done layer by layer."""

    def __init__(self, what: str) -> None:
        super().__init__(TINY)
        self.what, self.calls = what, 0
        self.layers = nn.ModuleList(OddLayer(what) for _ in range(3))
        if what == "returning hook":
            self.layers[1].down.register_forward_hook(lambda module, args, output: 2 * output)
        if what == "inner call":
            self.layers[0].inner = (self.layers[1],)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        cos, sin = self._rope(position_ids)
        x, given = self.embed(input_ids), Cache() if self.what == "cache" else None
        shift = torch.zeros(TINY.hidden, dtype=x.dtype)
        rows: list[torch.Tensor] = []
        self.calls += self.training
        order = list(self.layers)
        if self.what == "order" and self.calls % 2 == 0 and torch.is_grad_enabled():
            order = order[::-1]
        for layer in order:
            x = layer(x, cos, sin, given if given else shift, rows)
            if self.what == "glue":
                x = x * (1 + order[0].down.weight.mean())
            if self.what == "changed later":
                shift += 0.5
        if self.what == "attribute":
            x = x + sum(layer.left for layer in self.layers)
        if rows:
            x = x + rows[-1]
        return self.head(self.norm(x))


class OddLayer(Block):
    def __init__(self, what: str) -> None:
        super().__init__(TINY)
        self.what, self.inner = what, ()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, given: Any, rows: Any) -> torch.Tensor:  # type: ignore[override]
        if self.what == "in place":
            x += 1.0
        if isinstance(given, torch.Tensor):
            x = x + given
        if self.what == "counter":
            COUNTED.append(len(COUNTED))
            x = x * (1 + 0.1 * (len(COUNTED) % 7))
        for layer in self.inner:
            x = layer(x, cos, sin, given, rows)
        out = super().forward(x, cos, sin)
        if self.what == "list":
            rows.append(out)
        if self.what == "attribute":
            self.left = 0.1 * out.mean((0, 1))
        return out


COUNTED: list[int] = []
SENTENCES = {
    "cache": r"layer layers.0 is given a Cache, which can't be kept.*shard_weights=False",
    "in place": r"layer layers.0 changes its inputs in place.*shard_weights=False",
    "changed later": r"layer layers.\d is given something that is changed in place afterwards",
    "counter": r"layer layers.2 \(OddLayer\) gives something else for the same inputs when it is computed again",
    "list": r"layer layers.0 changes a list that it is given",
    "attribute": r"other gradients.*relative.*layer layers.2 depends on something beside",
    "glue": r"Odd (fails when|gets other gradients when) its layers are run one by one",
    "order": r"layer layers.\d is called .* is not the order in which",
    "returning hook": r"a forward hook of Linear in layer layers.1 returns something",
    "inner call": r"layer layers.1 is called from inside layer layers.0",
}


@pytest.mark.parametrize("what", SENTENCES)
def test_what_is_refused(what: str) -> None:
    COUNTED.clear()
    torch.manual_seed(0)
    model = Odd(what).double()
    before = [p.clone() for p in model.parameters()]
    engine = LayerMajor(model)
    with pytest.raises(UserError, match=SENTENCES[what]):
        try_layers(engine, Reader([torch.arange(30) % TINY.vocab]), CPU)
    engine.close()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    assert "forward" not in vars(model.layers[0])


@pytest.mark.parametrize("what", ["attribute", "glue", "counter", ""])
def test_it_shows_in_weights_that_stand_in_for_the_models(what: str) -> None:
    """All layers share memory, and of gradients only sketches are compared."""
    COUNTED.clear()
    with torch.device("meta"):
        model = Odd(what).double()
    sketches = InitialWeights(model, None, 0).stand_in(CPU)
    engine, reader = LayerMajor(model), Reader([torch.arange(30) % TINY.vocab])
    assert len({p.data_ptr() for layer in model.layers for p in layer.parameters()}) == 6
    with pytest.raises(UserError, match=SENTENCES[what]) if what else nullcontext():
        assert try_layers(engine, reader, CPU, sketches).layers == (0, 1, 2)
    assert all(p.grad is None and p.numel() for p in model.parameters())
    engine.close()


def test_a_model_as_it_should_be_is_not() -> None:
    torch.manual_seed(0)
    both_orders(Odd("").double(), TINY.vocab)


def test_a_model_without_layers_is_refused() -> None:
    model = Llama(TINY)
    model.layers = nn.Sequential(*model.layers)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"shard_weights needs a model whose layers are in an nn.ModuleList, and Llama"):
        LayerMajor(model)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"compare_batches is .* and shard_weights is on"):
        TrainerConfig(batch_tokens=1, max_steps=1, run_dir="x", shard_weights=True, compare_batches=1)
