"""Gradients in layer-major order are those of ordinary passes, whatever happens between a model's layers and inside."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from layer_steps import both_orders
from llama import Block, Llama
from steps import TINY
from tiny_models import VOCAB, tiny_model

SEEN: ContextVar[list[torch.Tensor]] = ContextVar("seen")
"""What hooks have seen in a pass, as Transformers collects it."""


class Decoder(Llama):
    """Layers in the forms that models give them; `mix` is what happens between them."""

    def __init__(self, mix: str) -> None:
        super().__init__(TINY)
        self.mix = mix
        self.layers = nn.ModuleList(Layer(mix) for _ in range(3))
        self.bias, self.side = nn.Parameter(torch.randn(TINY.hidden)), nn.Linear(TINY.hidden, TINY.hidden)
        if mix == "hooks":
            for layer in self.layers:
                layer.gate_up.register_forward_hook(lambda module, args, output: SEEN.get().append(output))

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        SEEN.set([])
        cos, sin = self._rope(position_ids)
        x, shared = self.embed(input_ids), {"first": self.side(self.bias)}
        inputs, extra = [], torch.zeros(())
        for layer in [*self.layers, *self.layers] if self.mix == "looped" else self.layers:
            inputs.append(x)
            if self.mix == "skipped at random" and self.training and float(torch.rand(())) < 0.4:
                continue
            with torch.set_grad_enabled(self.mix != "without gradients" or len(inputs) > 1):
                x = layer(x, cos, sin, shared=shared, bias=self.bias)
            if isinstance(x, tuple):
                x, out = x
                extra = extra + out.square().mean()
            if self.mix == "skips" and len(inputs) > 1:
                x = x + self.side(inputs[-2])
            elif self.mix == "in place":
                x += self.bias
        if self.mix == "hooks":
            extra = extra + sum(seen.square().mean() for seen in SEEN.get())
        losses = functional.cross_entropy(self.head(self.norm(x))[0], targets[0], ignore_index=-100, reduction="none")
        return (losses + extra)[None]


class Layer(Block):
    def __init__(self, mix: str) -> None:
        super().__init__(TINY)
        self.mix, self.calls = mix, nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shared: dict[str, torch.Tensor], bias: torch.Tensor
    ) -> Any:
        if self.mix == "counts":
            self.count += 1
        if self.mix == "mapping":
            x = x + shared["first"]
            shared["first"] = 0.5 * shared["first"] + x.mean((0, 1))
            shared["last"] = x
        out = super().forward(x, cos, sin) + bias
        return (out, out * 0.1) if self.mix == "tuples" else out


def tied() -> nn.Module:
    model = Llama(TINY)
    model.head.weight = model.embed.weight
    return model


def frozen() -> nn.Module:
    """The embedding and the first layer, so that the first layer has nothing to do in the backward."""
    model = Llama(TINY)
    for parameter in (*model.embed.parameters(), *model.layers[0].parameters()):
        parameter.requires_grad_(False)
    return model


def dropping() -> nn.Module:
    model = Llama(TINY)
    for layer in model.layers:
        layer.down = nn.Sequential(layer.down, nn.Dropout(0.2))
    return model


def shared_layer_weights() -> nn.Module:
    model = Llama(TINY)
    model.layers[1].down.weight = model.layers[0].down.weight
    return model


def lora() -> nn.Module:
    model: Any = tiny_model("llama", "heteromesh")
    target = ["q_proj", "v_proj", "o_proj"]
    adapted: nn.Module = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    )
    return adapted


def computed_again() -> nn.Module:
    model: Any = tiny_model("llama", "heteromesh")
    model.gradient_checkpointing_enable()
    whole: nn.Module = model
    return whole


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama of ours": lambda: Llama(TINY),
    "tied embeddings": tied,
    "frozen layers": frozen,
    "dropout": dropping,
    "weights shared by layers": shared_layer_weights,
    "LoRA": lora,
    "checkpointing of its own": computed_again,
} | {
    mix: lambda mix=mix: Decoder(mix)
    for mix in (
        "plain",
        "skips",
        "in place",
        "hooks",
        "mapping",
        "tuples",
        "counts",
        "looped",
        "skipped at random",
        "without gradients",
    )
}  # type: ignore[misc]


def compare(found: Any, tolerance: float) -> None:
    (loss, expected), (other, gradients) = found
    assert other == pytest.approx(loss, rel=tolerance)
    assert expected.keys() == gradients.keys()
    most = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * most)
        assert float((gradient - gradients[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("kept", [0, 1, 2], ids="{} kept".format)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_passes(kind: str, kept: int) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().double().train()
    compare(both_orders(model, min(VOCAB, TINY.vocab), kept=kept), 1e-12)
    if kind == "counts":
        assert [int(layer.count) for layer in model.layers] == [6, 6, 6], "each of two steps' three passes counts once"


@pytest.mark.parametrize("kept", [0, 2], ids="{} kept".format)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt2", "mixtral"])
def test_gradients_of_transformers_models(kind: str, kept: int) -> None:
    compare(both_orders(tiny_model(kind, "heteromesh").double().train(), VOCAB, kept=kept), 1e-12)


@pytest.mark.parametrize("kept", [0, 2], ids="{} kept".format)
def test_gradients_in_bf16(kept: int) -> None:
    torch.manual_seed(0)
    compare(both_orders(dropping(), TINY.vocab, autocast=torch.bfloat16, kept=kept), 1e-6)


def test_gradients_under_autocast_of_the_callers_own() -> None:
    torch.manual_seed(0)
    model = Llama(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        compare(both_orders(model, TINY.vocab), 1e-6)


def test_inputs_may_wait_in_host_memory() -> None:
    torch.manual_seed(0)
    compare(both_orders(Llama(TINY).double(), TINY.vocab, lengths=(40, 30), offload=0.7), 1e-12)


def test_compiled_layers() -> None:
    torch.manual_seed(0)
    model = Llama(replace(TINY, layers=1)).double()
    model.layers[0].down = nn.Sequential(model.layers[0].down, nn.Dropout(0.2))
    model.layers[0].compile(backend="aot_eager")
    compare(both_orders(model, TINY.vocab, lengths=(8, 8, 8)), 1e-12)


def test_a_step_leaves_random_generators_where_they_were() -> None:
    model = dropping()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    both_orders(model, TINY.vocab)
    assert torch.equal(torch.rand(3), expected)
