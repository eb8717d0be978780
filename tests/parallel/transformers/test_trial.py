"""Models of Transformers before the first step: what passes would change is refused, what they don't trains exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers

from backwards import on_another_thread
from heteromesh.errors import UserError
from heteromesh.parallel.model.call import ModelCall
from heteromesh.parallel.model.self_check import check_model
from heteromesh.parallel.model.tables import find_tables
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from instances import random_costs, random_lengths, random_step
from ranks import World, run_ranks

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAMPLE = torch.randint(97, (100,), generator=torch.Generator().manual_seed(0))


def build(kind: str, **options: Any) -> torch.nn.Module:
    from heteromesh.parallel.transformers import register

    register()
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="heteromesh")
    return model.train()


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_models_of_attention_alone_pass(kind: str) -> None:
    model = build(kind)
    check_model(model, SAMPLE, 300, split=True)
    tables = find_tables(model)
    assert (tables.vocabulary, tables.positions, tables.outputs) == (97, None, 97)


def test_short_convolutions_are_refused_by_name() -> None:
    model = build("Lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3)
    with pytest.raises(UserError, match=r"packed sequences.*model.layers.0.conv \(Lfm2ShortConv\) is the first"):
        check_model(model, SAMPLE, 300, split=True)


def test_positions_that_begin_elsewhere_are_refused() -> None:
    with pytest.raises(UserError, match="RobertaForCausalLM gives other losses without position_ids"):
        check_model(build("Roberta", is_decoder=True), SAMPLE, 300, split=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_of_their_own_is_refused(attention: str) -> None:
    """It is right when packed: by the positions Transformers sees where sequences begin."""
    model = build("Llama")
    model.set_attn_implementation(attention)
    with pytest.raises(UserError, match=r"over two ranks.*self_attn \(LlamaAttention\).*attn_implementation='heterom"):
        check_model(model, SAMPLE, 300, split=True)


def test_losses_of_routers_are_refused() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    x, positions = torch.arange(9)[None], torch.arange(9)[None]
    with pytest.raises(UserError, match=r"returned aux_loss = .*output_router_logits=False"):
        ModelCall(build("Mixtral", output_router_logits=True, router_aux_loss_coef=1.0, **experts)).output(x, positions)
    ModelCall(build("Mixtral", output_router_logits=True, router_aux_loss_coef=0.0, **experts)).output(x, positions)
    ModelCall(build("Mixtral", **experts)).output(x, positions)


def test_a_table_of_positions_is_found() -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "max_position_embeddings": 64}
    tables = find_tables(build("GPT2", **sizes))
    assert (tables.vocabulary, tables.positions) == (97, 64)


def gradients(world: World, kind: str) -> list[float]:
    rng = random.Random(world.size)
    costs = random_costs(rng, world.size)
    lengths = random_lengths(rng, sum(costs.capacity) // 3)
    step = random_step(rng, lengths, world.size)
    data = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(1)) for n in lengths]
    model: Any = build("Llama")
    if kind:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    executor, original = StepExecutor(model, world, seed=3), torch.Tensor.backward
    torch.Tensor.backward = on_another_thread(original)  # type: ignore[method-assign]
    try:
        loss = executor.run(step, Reader(data).step_inputs(step, range(len(data)), world.rank), number=2).loss
    finally:
        torch.Tensor.backward = original  # type: ignore[method-assign]
    return [loss, *(float(p.grad.double().norm()) for p in model.parameters())]


def all_gradients(world: World) -> list[list[float]]:
    return [gradients(world, kind) for kind in ("", "reentrant", "not reentrant")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_checkpointing_knows_its_pass_on_autograds_threads(ranks: int) -> None:
    plain, *others = run_ranks(ranks, all_gradients)[0]
    for values in others:
        assert values == pytest.approx(plain, rel=1e-5)
