"""Trainer with a plan file that trains in pipeline stages: the losses of one process, whatever the stages."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from stage_plans import write_stage_plan
from stages import simple
from torch import nn

import heteromesh as hm
from heteromesh.errors import UserError
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.runtime.hooks.api import Hook
from llama import Llama
from ranks import World, run_ranks
from steps import TINY

DEEP = replace(TINY, layers=4)
DATA = [[random.Random(i).randrange(TINY.vocab) for _ in range(2 + (i * 37) % 60)] for i in range(40)]
UNEVEN = Placement(
    stages=(Stage(ranks=(2, 1), layers=1), Stage(ranks=(0, 3), layers=3)),
    micro_batches=(4, 2),
)


class Dropping(Llama):
    """With dropout before, in and after the layers."""

    def __init__(self, tied: bool) -> None:
        super().__init__(DEEP)
        if tied:
            self.head.weight = self.embed.weight
        for layer in self.layers:
            layer.register_forward_hook(_drop)
        self.drop = nn.Dropout(0.1)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        cos, sin = self._rope(position_ids)
        x = self.drop(self.embed(input_ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.drop(self.norm(x)))


def _drop(layer: nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
    return functional.dropout(out, 0.2, training=layer.training)


class Sums(Hook):
    """Evaluates on the whole model."""

    evaluate_every = 2

    def __init__(self) -> None:
        self.seen: list[float] = []

    def evaluate(self, step: int, model: nn.Module, world: World) -> Mapping[str, float]:
        self.seen.append(float(model(torch.arange(9)[None]).square().mean()))
        return {"square": self.seen[-1]}


def make_trainer(folder: Path, tied: bool, **changes: Any) -> tuple[hm.Trainer, Sums]:
    torch.manual_seed(7)
    model, sums = Dropping(tied), Sums()
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    rest = [p for n, p in model.named_parameters() if "norm" not in n]
    # the groups are not equally spread over stages
    groups = [{"params": rest}, {"params": norms, "lr": 1e-3}, {"params": []}]
    groups[0]["params"] = [p for p in rest if p is not model.head.weight or tied]
    groups[2] = {"params": [] if tied else [model.head.weight], "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    options = {"batch_tokens": 120, "max_steps": 6, "run_dir": folder, "plan_seconds": 0.02, "clip_norm": 0.3}
    config = hm.TrainerConfig(**(options | changes))
    data = [torch.tensor(s) for s in DATA]
    return hm.Trainer(model, optimizer, data, config, schedule=schedule, hooks=[sums]), sums


def train(
    world: World, folder: Path, tied: bool, changes: dict[str, Any]
) -> tuple[list[float], list[float], dict[str, Any]]:
    trainer, sums = make_trainer(folder, tied, **changes)
    losses = list(trainer.fit().losses)
    return losses, sums.seen, {k: v.numpy() for k, v in trainer.model.state_dict().items()}


def refused(world: World, folder: Path, changes: dict[str, Any]) -> str:
    try:
        train(world, folder, False, changes)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process without stages, checkpoint after three of six steps."""
    folder = tmp_path_factory.mktemp("alone")
    losses, seen, weights = run_ranks(1, train, folder, request.param, {"checkpoint_every": 3})[0]
    return request.param, losses, seen, weights, folder


def close(alone: Any, results: list[Any], first: int = 0) -> None:
    _, losses, seen, weights, _ = alone
    for own_losses, own_seen, own_weights in results:
        assert own_losses == pytest.approx(losses[first:], rel=1e-5)
        assert own_seen == pytest.approx(seen[first // 2 :], rel=1e-4)
        for name, value in weights.items():
            np.testing.assert_allclose(own_weights[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "placement", [simple(1, 3), UNEVEN, simple(1, 2, 1)], ids=["two stages", "uneven replicas", "three stages"]
)
def test_losses_and_weights_are_those_of_one_process(alone: Any, placement: Placement, tmp_path: Path) -> None:
    plan = write_stage_plan(tmp_path / "plan.json", placement)
    ranks = sum(len(s.ranks) for s in placement.stages)
    changes = {"plan": plan, "checkpoint_activations": placement is UNEVEN}
    close(alone, run_ranks(ranks, train, tmp_path / "run", alone[0], changes))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["grad_norm"] > 0 and row["predicted_seconds"] > 0 for row in rows)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert [s["layers"] for s in config["stages"]] == [s.layers for s in placement.stages]


def test_resume_into_other_stages_and_none(alone: Any, tmp_path: Path) -> None:
    tied, folder = alone[0], tmp_path / "run"
    two = write_stage_plan(tmp_path / "two.json", simple(3, 1))
    three = write_stage_plan(tmp_path / "three.json", simple(1, 2, 1))
    close_first = run_ranks(2, train, folder, tied, {"plan": two, "max_steps": 2})
    assert close_first[0][0] == pytest.approx(alone[1][:2], rel=1e-5)
    rest = run_ranks(3, train, folder, tied, {"plan": three, "max_steps": 4, "resume": True})
    assert rest[0][0] == pytest.approx(alone[1][2:4], rel=1e-5)
    close(alone, run_ranks(1, train, folder, tied, {"resume": True}), 4)


def test_stages_resume_a_run_without(alone: Any, tmp_path: Path) -> None:
    tied, folder = alone[0], tmp_path / "run"
    run_ranks(1, train, folder, tied, {"max_steps": 3})
    plan = write_stage_plan(tmp_path / "plan.json", UNEVEN)
    close(alone, run_ranks(4, train, folder, tied, {"plan": plan, "resume": True}), 3)


def test_replicas_compress(alone: Any, tmp_path: Path) -> None:
    plan = write_stage_plan(tmp_path / "plan.json", UNEVEN)
    changes = {"plan": plan, "gradient_compression": "int8"}
    results = run_ranks(4, train, tmp_path / "run", alone[0], changes)
    assert results[0][0] == pytest.approx(alone[1], rel=1e-2)
    assert results[0][0] != pytest.approx(alone[1], rel=1e-8)
    assert json.loads((tmp_path / "run/config.json").read_text())["gradient_compression"] == "int8"
    for name, value in results[0][2].items():
        assert all(np.array_equal(other[2][name], value) for other in results)


@pytest.mark.parametrize(
    ("placement", "changes", "message"),
    [
        (simple(1, 2), {}, "1 + 2 = 3 layers and the model has 4"),
        (simple(1, 2, 1), {}, "is for 3 ranks and the job has 2"),
        (
            simple(1, 3),
            {"shard_optimizer": True},
            "shard_optimizer is True and plan file",
        ),
        (simple(1, 3), {"shard_weights": True}, "shard_weights is True and plan file"),
        (simple(1, 3), {"compare_batches": 2}, "compare_batches is 2 and plan file"),
        (simple(1, 3), {"offload_optimizer": "disk"}, "offload_optimizer is 'disk' and plan file"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(
    placement: Placement, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plan = write_stage_plan(tmp_path / "plan.json", placement)
    for told in run_ranks(2, refused, tmp_path / "run", changes | {"plan": plan}):
        assert message in told
        assert "\n" not in told


def fit_with_a_loss(world: World, folder: Path, plan: Path) -> str:
    trainer, _ = make_trainer(folder, False, plan=plan)
    try:
        hm.Trainer(trainer.model, None, trainer.data, trainer.config, loss=lambda outputs, batch: outputs[:, 0]).fit()
    except UserError as error:
        return str(error)
    return ""


def test_a_loss_of_ones_own_is_refused(tmp_path: Path) -> None:
    plan = write_stage_plan(tmp_path / "plan.json", simple(1, 3))
    for told in run_ranks(2, fit_with_a_loss, tmp_path / "run", plan):
        assert "<lambda> and the plan trains the model in pipeline stages" in told


class Scaled(Llama):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        cos, sin = self._rope(position_ids)
        x = self.embed(input_ids) * 5.0
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def fit_scaled(world: World, folder: Path, plan: Path) -> str:
    config = hm.TrainerConfig(batch_tokens=120, max_steps=1, run_dir=folder, plan=plan)
    try:
        hm.Trainer(Scaled(DEEP), None, [torch.tensor(s) for s in DATA], config).fit()
    except UserError as error:
        return str(error)
    return ""


def test_a_model_whose_stages_are_not_the_model_is_refused(tmp_path: Path) -> None:
    plan = write_stage_plan(tmp_path / "plan.json", simple(1, 3))
    for told in run_ranks(2, fit_scaled, tmp_path / "run", plan):
        assert "Scaled cut into 2 stages gives other losses than whole" in told
