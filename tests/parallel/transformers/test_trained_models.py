"""Transformers models of four kinds, windows and sinks included, trained by the Trainer, with LoRA and without."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import heteromesh as hm
from ranks import World, run_ranks
from tiny_models import documents, plain_losses, tiny_model

KINDS = ("llama", "qwen3 with windows", "gemma3", "gpt_oss")
STEPS, RATE = 3, 5e-3
DATA = documents((20, 34, 50, 11), 0)
"""All of it is every step's batch, so that nothing hangs on the order."""
COSTS = """
seconds_per_token2 = 1e-7
seconds_per_token = 1e-4
seconds_per_pass = 1e-4
bytes_per_token = 512
tokens_per_device = {}
[bytes_per_second]
2 = 1e9
3 = 1e9
"""


def build(kind: str, attention: str, lora: bool) -> torch.nn.Module:
    model: Any = tiny_model(kind, attention, num_hidden_layers=2)
    if lora:  # matrices that are not 0
        torch.manual_seed(1)
        target = ["q_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    return model


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def train(world: World, folder: Path, sharded: bool) -> dict[tuple[str, bool], list[float]]:
    costs = folder / f"costs-{world.rank}.toml"
    # on several ranks the longest sequence fits none alone
    costs.write_text(COSTS.format(150 if world.size == 1 else 90 // world.size))
    found = {}
    for kind in KINDS:
        for lora in (False, True):
            model = build(kind, "heteromesh", lora)
            settings = hm.TrainerConfig(
                batch_tokens=115, max_steps=STEPS, run_dir=folder / f"{kind} {lora}", cost=costs, clip_norm=None,
                plan_seconds=0.02, print_plans=0, shard_weights=sharded,
            )  # fmt: skip
            found[kind, lora] = list(hm.Trainer(model, optimizer_of(model), DATA, settings).fit().losses)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, bool], list[float]]:
    """In plain torch."""
    found = {}
    for kind in KINDS:
        for lora in (False, True):
            model = build(kind, "eager", lora)
            found[kind, lora] = plain_losses(model, [DATA] * STEPS, optimizer_of(model))
    return found


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_losses_equal_plain_torch(ranks: int, sharded: bool, alone: dict[tuple[str, bool], list[float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(ranks, train, Path(folder), sharded)
    for key, expected in alone.items():
        assert expected[-1] < expected[0] - 0.1, key  # it learns
        for result in results:
            assert result[key] == pytest.approx(expected, abs=1e-4), key
