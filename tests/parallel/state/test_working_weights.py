"""Weights gathered in 16 bit: the bits of a step under autocast that gathers them in 32, and half the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from heteromesh.comm.gradients.buckets import build_buckets
from heteromesh.parallel.state.sharded_weights import ShardedWeights
from heteromesh.runtime.engine.layer_major import LayerMajor
from heteromesh.runtime.engine.working_trial import try_working_weights
from heteromesh.runtime.training.layer_trial import trial_works, try_layers
from heteromesh.runtime.work.reader import Reader
from layer_steps import ShardedSteps, local_step
from llama import Llama, LlamaConfig
from owners import collectives_of
from ranks import World, run_ranks
from steps import TINY
from tiny_models import tiny_model

LENGTHS, PLACES = [9, 14, 3, 8, 1], (0, 1, 1, 0, 1)
BF16 = torch.bfloat16


class Odd(nn.Module):
    """A linear map that does something else with its weight, too."""

    def __init__(self, linear: Any, use: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.use = linear, use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.linear, x)


def odd(name: str, use: Callable[[Any, torch.Tensor], torch.Tensor]) -> nn.Module:
    model = Llama(TINY)
    for layer in model.layers:
        part = layer.attention if hasattr(layer.attention, name) else layer
        setattr(part, name, Odd(getattr(part, name), use))
    return model


def scaled(linear: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x) * linear.weight.square().mean()


def transposed_too(linear: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x) + x @ linear.weight.t()


def of_its_dtype(linear: Any, x: torch.Tensor) -> torch.Tensor:
    return linear((x.float() * 1.01).to(linear.weight.dtype) * 1.01)


def lora(dropout: float) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, lora_dropout=dropout)
    model: Any = tiny_model("llama", "heteromesh")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def compiled() -> nn.Module:
    model = Llama(LlamaConfig(**{**vars(TINY), "layers": 1}))
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    return model


PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "llama of ours": (lambda: Llama(TINY), {"qkv", "out", "gate_up", "down"}),
    "llama": (lambda: tiny_model("llama", "heteromesh"), PROJECTIONS),
    "gpt2": (lambda: tiny_model("gpt2", "heteromesh"), {"c_attn", "c_proj", "c_fc"}),
    "mixtral": (
        lambda: tiny_model("mixtral", "heteromesh"),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_up_proj", "down_proj"},
    ),
    "LoRA": (lambda: lora(0.0), PROJECTIONS - {"q_proj", "o_proj"} | {"base_layer", "default"}),
    # adapters round what they drop out to their weights' dtype
    "LoRA with dropout": (lambda: lora(0.1), PROJECTIONS - {"q_proj", "o_proj"} | {"base_layer"}),
    "used otherwise": (lambda: odd("down", scaled), {"qkv", "out", "gate_up"}),
    "used twice": (lambda: odd("out", transposed_too), {"qkv", "gate_up", "down"}),
    "asks for a dtype": (lambda: odd("down", of_its_dtype), set()),
    "compiled": (compiled, {"qkv", "out", "gate_up", "down"}),
}
"""With the last names of what is gathered in 16 bit."""


@dataclass(frozen=True)
class Trained:
    """What a few steps come to on a rank."""

    names: tuple[str, ...]
    """Of the weights that are gathered in 16 bit."""
    numbers: tuple[float, ...]
    """Losses and norms of gradients."""
    values: list[torch.Tensor]
    """State of the optimizer, and parameters."""
    sent: int
    """Bytes, in the last step."""
    most: int
    """Bytes of gathered weights."""


def train(world: World, kind: str, cast: bool, resident: Sequence[Sequence[int]]) -> Trained:
    torch.manual_seed(0)
    model, device = MODELS[kind][0](), world.device
    lengths = [8] * len(LENGTHS) if kind == "compiled" else LENGTHS
    data = [torch.randint(60, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    engine = LayerMajor(model, seed=3, autocast=BF16)
    order = try_layers(engine, Reader(data), device)
    found = try_working_weights(engine, trial_works(Reader(data), device)[0], order, device)
    engine.close()
    names = tuple(name for name, p in model.named_parameters() if any(p is f for f in found))
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    working = dict.fromkeys(found, BF16)
    sharded = ShardedSteps(
        model, world, optimizer, order=order, resident=resident, seed=3, autocast=BF16, working=working, cast=cast
    )
    numbers, step = list[float](), local_step(lengths, PLACES)
    assert world.collectives is not None
    for number in range(3):
        before = world.collectives.sent_bytes
        result = sharded.run(step, data, number)
        numbers += [result.loss, sharded.state.apply(result.summed, 0.5)]
        sharded.state.begin()
        sent = world.collectives.sent_bytes - before
    most, state = sharded.state.most_bytes, [v for s in optimizer.state.values() for v in s.values()]
    sharded.close()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return Trained(names, tuple(numbers), [*state, *(p.detach() for p in model.parameters())], sent, most)


def both(world: World, kinds: Sequence[str], resident: Sequence[Sequence[int]]) -> dict[str, tuple[Trained, Trained]]:
    """By kind, with weights gathered in 32 bit and in 16; the same buckets, so that norms are summed alike."""
    found = {}
    for kind in kinds:
        with collectives_of(world, (0.3,)) as collectives:
            world.collectives = collectives
            one, other = train(world, kind, False, resident), train(world, kind, True, resident)
            world.barrier()
        assert one.numbers == other.numbers, kind
        assert all(torch.equal(a, b) for a, b in zip(one.values, other.values, strict=True)), kind
        found[kind] = replace(one, values=[]), replace(other, values=[])
    return found


@pytest.mark.parametrize(
    ("kinds", "resident"),
    [
        (["llama of ours", "llama", "gpt2", "mixtral"], [(0,), (1, 2), ()]),
        (["LoRA", "LoRA with dropout", "used otherwise", "used twice", "asks for a dtype"], [(0,), (1, 2)]),
        (["compiled"], [(0,), ()]),
    ],
)
def test_the_bits_are_those_of_weights_gathered_in_32_bit(kinds: list[str], resident: list[tuple[int, ...]]) -> None:
    for result in run_ranks(len(resident), both, kinds, resident):
        for kind, (one, other) in result.items():
            names = (name.removesuffix(".weight").rsplit(".", 1)[-1] for name in other.names)
            assert set(names) == MODELS[kind][1], kind
            assert other.most < one.most if other.names else other.most == one.most


def test_weights_in_16_bit_travel_and_are_held_in_half_the_bytes() -> None:
    (one, other), (second, another) = (result["llama of ours"] for result in run_ranks(2, both, ["llama of ours"], ()))
    layer = Llama(TINY).layers[0]
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    # two layers: the first is gathered twice and the last once
    assert one.sent + second.sent - other.sent - another.sent == 3 * 2 * matrices
    assert one.most - other.most == second.most - another.most == 2 * 2 * matrices


def test_buckets_of_two_dtypes_are_refused() -> None:
    run_ranks(2, refused)


def refused(world: World) -> None:
    model = Llama(TINY)
    working = {model.layers[0].down.weight: BF16}
    with collectives_of(world, ()) as collectives:
        world.collectives = collectives
        layers = [list(layer.parameters()) for layer in model.layers]
        buckets = build_buckets(model.parameters(), groups=layers)
        with pytest.raises(ValueError, match="several dtypes"):
            ShardedWeights(torch.optim.SGD(model.parameters()), model, buckets, world, layers, working=working)
