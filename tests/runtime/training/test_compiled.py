"""Compiled models train as they do uncompiled, and their checkpoints are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

import heteromesh as hm
from llama import Block, Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA, gather_costs


class Dropping(Block):
    def __init__(self) -> None:
        super().__init__(TINY)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.drop(super().forward(x, cos, sin))


class Losses(Llama):
    """Takes targets, and has dropouts."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.layers = nn.ModuleList(Dropping() for _ in range(2))

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        logits = super().forward(input_ids, position_ids)
        return functional.cross_entropy(logits[0], targets[0], ignore_index=-100, reduction="none")[None]


def train(world: World, folder: Path, kind: str, compiled: str, steps: int, resume: bool) -> tuple[float, ...]:
    torch.manual_seed(7)
    model: Any = Llama(TINY) if kind == "logits" else Losses()
    # without a compiler of C++: the graphs are what is tried
    if compiled == "layers":
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    elif compiled == "model":
        model = torch.compile(model, backend="aot_eager")
    # two ranks have to split the longest sequences
    (folder / "cost.toml").write_text(gather_costs(64 if world.size > 1 else 128))
    settings: dict[str, Any] = {"batch_tokens": 220, "plan_seconds": 0.02, "print_plans": 0, "checkpoint_every": 2}
    config = hm.TrainerConfig(
        **settings, max_steps=steps, run_dir=folder / "run", resume=resume, cost=folder / "cost.toml"
    )
    return hm.Trainer(model, None, [torch.tensor(s) for s in DATA], config).fit().losses


# few: tracing a model takes long
@pytest.mark.parametrize(("ranks", "kind", "compiled"), [(1, "logits", "layers"), (2, "targets", "model")])
def test_compiled_and_plain_models_have_equal_losses(ranks: int, kind: str, compiled: str, tmp_path: Path) -> None:
    losses = []
    for how in ("", compiled):
        folder = tmp_path / (how or "plain")
        folder.mkdir()
        losses.append(run_ranks(ranks, train, folder, kind, how, 2, False)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_checkpoints_of_plain_models_resume_compiled_and_back(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = run_ranks(1, train, whole, "targets", "", 3, False)[0]
    found: tuple[float, ...] = ()
    for compiled, steps in (("", 1), ("model", 2), ("", 3)):
        found += run_ranks(1, train, parts, "targets", compiled, steps, bool(found))[0]
    assert found == pytest.approx(expected, rel=1e-5)
