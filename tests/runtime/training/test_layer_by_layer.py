"""Training with sharded weights beside the other modes: they take over from each other, and end as they should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

import heteromesh as hm
from heteromesh.parallel.model.loss import LossBatch
from heteromesh.runtime.engine.working_trial import try_working_weights
from heteromesh.runtime.training import layer_trial
from llama import Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA, gather_costs, make_trainer

MODES: tuple[dict[str, Any], ...] = (
    {"shard_weights": True},
    {},
    {"shard_weights": True},
    {"shard_optimizer": True},
    {"shard_weights": True, "gradient_compression": "none"},
)
"""Of a run's steps, one after the other."""


def trainer_of(folder: Path, **changes: Any) -> hm.Trainer:
    torch.manual_seed(7)
    model = Llama(TINY)
    model.head.weight = model.embed.weight
    trainer = make_trainer(folder, model, **changes)
    # with a large epsilon, as rounding decides the sign of small gradients
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
    return hm.Trainer(model, optimizer, trainer.data, trainer.config)


def in_turns(world: World, folder: Path) -> tuple[list[float], list[list[float]]]:
    losses: list[float] = []
    for done, settings in enumerate(MODES):
        trainer = trainer_of(folder, max_steps=done + 1, resume=bool(done), **settings)
        losses += trainer.fit().losses
    return losses, [p.flatten().tolist() for p in trainer.model.parameters()]


def test_modes_go_on_from_each_others_checkpoints(tmp_path: Path) -> None:
    """Tied weights, and state of an optimizer with momentum: what is lost on the way shows in the losses."""
    alone = trainer_of(tmp_path / "alone", max_steps=len(MODES))
    expected = alone.fit().losses
    for losses, parameters in run_ranks(2, in_turns, tmp_path / "run"):
        assert losses == pytest.approx(expected, rel=1e-5)
        for mine, other in zip(parameters, alone.model.parameters(), strict=True):
            assert mine == pytest.approx(other.flatten().tolist(), abs=1e-4)


class Breaking(nn.Module):
    """Its loss is not a number after three updates."""

    def __init__(self) -> None:
        super().__init__()
        self.llama, self.steps = Llama(TINY), nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        broken = self.steps.detach().abs() > 2.5e-3
        logits = self.llama(input_ids, position_ids) + self.steps * torch.arange(TINY.vocab)
        return logits.masked_fill(broken, math.nan)


def breaking(world: World, folder: Path) -> str:
    trainer = make_trainer(folder, Breaking(), shard_weights=True, checkpoint_every=1, learning_rate=1e-3)
    try:
        trainer.fit()
    except hm.UserError as error:
        return str(error)
    return ""


def test_a_loss_that_is_not_finite_ends_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, breaking, tmp_path)
    assert first == second
    assert "the loss is nan at step" in first


class Whole(hm.Hook):
    """Sees whether the whole model is here."""

    evaluate_every = 1

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def step_committed(self, step: hm.StepCommitted) -> None:
        self.seen.append(("step", self._whole()))

    def evaluate(self, step: int, model: nn.Module, world: World) -> dict[str, float]:
        self.model = model
        self.seen.append(("evaluate", self._whole()))
        return {}

    def end(self, report: hm.TrainingReport) -> None:
        self.seen.append(("end", self._whole()))

    def _whole(self) -> bool:
        return all(p.numel() for p in self.model.layers.parameters()) if hasattr(self, "model") else False


def summed_loss(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """Of each sequence, wherever its tokens are."""
    return batch.sum(functional.cross_entropy(outputs, batch["labels"], ignore_index=-100, reduction="none"))


def with_a_loss(world: World, folder: Path, sharded: bool) -> tuple[list[float], list[tuple[str, bool]]]:
    torch.manual_seed(7)
    model, hook = Llama(TINY), Whole()
    # no rank alone can hold the longest
    config = hm.TrainerConfig(
        batch_tokens=220, max_steps=3, run_dir=folder, shard_weights=sharded, plan_seconds=0.02,
        tokens_per_device=60 if world.size > 1 else None,
    )  # fmt: skip
    data = [{"input_ids": s} for s in DATA]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return list(hm.Trainer(model, optimizer, data, config, hooks=[hook], loss=summed_loss).fit().losses), hook.seen


def test_a_loss_of_ones_own_and_what_hooks_see(tmp_path: Path) -> None:
    expected, _ = with_a_loss(World(), tmp_path / "alone", False)
    for losses, seen in run_ranks(2, with_a_loss, tmp_path / "run", True):
        assert losses == pytest.approx(expected, rel=2e-5)
        assert seen[-4:] == [("evaluate", True), ("step", False), ("evaluate", True), ("end", True)]


class Loss(hm.Hook):
    """The loss of a sequence without autocast."""

    evaluate_every = 1

    def __init__(self) -> None:
        self.seen: list[float] = []

    def evaluate(self, step: int, model: nn.Module, world: World) -> dict[str, float]:
        tokens = torch.arange(20)[None]
        with torch.no_grad():
            self.seen.append(float(functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])))
        return {}


def in_halves(world: World, folder: Path) -> dict[bool, tuple[list[float], int]]:
    """By whether weights are gathered in 16 bit, losses, and how many parameters were found to be fit for it."""
    costs, found = folder / f"cost-{world.rank}.toml", {}
    costs.write_text(gather_costs(64))
    for cast in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            chosen: list[int] = []

            def trial(*args: Any, cast: bool = cast, chosen: list[int] = chosen) -> tuple[nn.Parameter, ...]:
                parameters = try_working_weights(*args)
                chosen.append(len(parameters))
                return parameters if cast else ()

            patch.setattr(layer_trial, "try_working_weights", trial)
            losses, settings = list[float](), {"shard_weights": True, "precision": "bf16", "cost": costs}
            for last in (2, 4):
                loss = Loss()
                made = trainer_of(folder / str(cast), max_steps=last, resume=last > 2, **settings)
                trainer = hm.Trainer(made.model, made.optimizer, made.data, made.config, hooks=[loss])
                losses += [*trainer.fit().losses, *loss.seen]
            assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        found[cast] = losses, sum(chosen)
    return found


def test_weights_are_gathered_in_16_bit_under_autocast(tmp_path: Path) -> None:
    first, second = run_ranks(2, in_halves, tmp_path)
    assert first[True][1] == 2 * 4 * TINY.layers, "four matrices a layer, in two runs, tried on the first rank"
    assert second[True][1] == 0
    # a norm is summed bucket by bucket, and what is clipped by it may have other last bits
    assert first[True][0] == second[True][0] == pytest.approx(first[False][0], rel=1e-6)
