"""Unmodified Transformers models under a plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.step import plan_step
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from packs import SPLIT
from ranks import World, run_ranks
from steps import random_costs

VOCAB = 97
STEPS = 10
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def build(kind: str, attention: str, **options: Any) -> torch.nn.Module:
    from heteromesh.parallel.transformers import register

    register()
    config = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
    }[kind](**SIZES | options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def batches() -> list[list[torch.Tensor]]:
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    lengths = [[rng.randint(2, 20), rng.randint(20, 150), rng.randint(2, 60)] for _ in range(STEPS)]
    # few tokens, so that there is something to learn
    return [[torch.randint(12, (n,), generator=generator) for n in row] for row in lengths]


def planned(lengths: Sequence[int], ranks: int, seed: int) -> Step:
    """A plan whose split passes use any of the methods."""
    rng = random.Random(seed)
    costs = replace(random_costs(rng, ranks), capacity=(120,) * ranks)
    step = plan_step(lengths, costs)
    passes = [p if p.method == "local" else replace(p, method=rng.choice(SPLIT)) for p in step.passes]
    return replace(step, passes=tuple(passes))


def train(world: World, folder: str, steps: Sequence[Step]) -> tuple[list[float], set[str]]:
    model, losses, methods = build("llama", "heteromesh"), [], set()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    executor = StepExecutor(model, world)
    for step, batch in zip(steps, batches(), strict=True):
        methods |= {p.method for p in step.passes}
        losses.append(executor.run(step, Reader(batch).step_inputs(step, range(len(batch)), world.rank)).loss)
        optimizer.step()
    if world.rank == 0:
        model.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert loaded.config._attn_implementation != "heteromesh"
        tokens = batches()[0][1].view(1, -1)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=0)
    return losses, methods


def train_alone() -> list[float]:
    model, losses = build("llama", "eager"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches():
        optimizer.zero_grad()
        total = sum(len(t) - 1 for t in batch)
        loss = sum(
            torch.nn.functional.cross_entropy(model(t.view(1, -1)).logits[0, :-1], t[1:], reduction="sum")
            for t in batch
        ) / total  # fmt: skip
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses


def test_ten_steps_on_four_ranks_equal_one_process(tmp_path: Path) -> None:
    # made once: a search that the time limit cuts short ends differently on every rank
    steps = [planned([len(t) for t in batch], 4, number) for number, batch in enumerate(batches())]
    alone = train_alone()
    assert alone[-1] < alone[0] - 0.5
    for losses, methods in run_ranks(4, train, str(tmp_path), steps):
        assert losses == pytest.approx(alone, abs=1e-3)
        assert len(methods) > 4
    assert list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_outside_a_pass_it_is_transformers_own_attention(kind: str) -> None:
    ours, theirs = build(kind, "heteromesh").eval(), build(kind, "sdpa").eval()
    tokens = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 30, dtype=torch.long)
    padding[1, :10] = 0
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        assert torch.equal(ours(tokens, attention_mask=padding).logits, theirs(tokens, attention_mask=padding).logits)
        generated = [m.generate(tokens[:1], max_new_tokens=5, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    ("kind", "options", "call", "rule"),
    [
        ("llama", {"attention_dropout": 0.1}, {}, "attention dropout 0.1"),
        ("llama", {}, {"attention_mask": torch.tensor([[0] + [1] * 9])}, "no padding and no attention_mask"),
        ("llama", {}, {"attention_mask": torch.zeros(1, 1, 10, 10)}, "takes no mask"),
    ],
)
def test_what_can_not_be_split_is_refused_inside_a_pass(kind: str, options: dict, call: dict, rule: str) -> None:
    model = build(kind, "heteromesh", **options).train()
    plan = Pass(ranks=(0,), method="local", sequences=(0,), shards=((10,),), seconds=0.0)
    with prepare_pass(plan, (10,), World(), (1.0,)).active(), pytest.raises(ValueError, match=rule):
        model(torch.arange(10).view(1, -1), **call)
