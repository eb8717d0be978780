"""fp16 with loss scaling: the numbers of a loop with torch's GradScaler, and steps that all ranks skip or none."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import heteromesh as hm
from heteromesh.runtime.engine import loss_scale
from heteromesh.runtime.hooks.api import Hook, StepCommitted
from heteromesh.runtime.training import job_check
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA, gather_costs

MODES: tuple[dict[str, Any], ...] = ({}, {"shard_optimizer": True}, {"shard_weights": True})
BROKEN = 2
"""The step whose gradients overflow, on one rank."""


class Breaking(Hook):
    """Makes a gradient overflow in one step."""

    def __init__(self, parameter: nn.Parameter, *, here: bool) -> None:
        self._step, self._here = 1, here
        parameter.register_hook(self._gradient)

    def _gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if self._here and self._step == BROKEN else gradient

    def step_committed(self, step: StepCommitted) -> None:
        """See Hook."""
        self._step += 1


def trainer_of(folder: Path, *, breaks: bool = False, **changes: Any) -> hm.Trainer:
    torch.manual_seed(7)
    model = Llama(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.toml").write_text(gather_costs(128))
    options: dict[str, Any] = {"batch_tokens": 220, "run_dir": folder, "plan_seconds": 0.02, "print_plans": 0}
    options["max_steps"] = 1
    config = hm.TrainerConfig(**(options | {"precision": "fp16", "cost": folder / "cost.toml"} | changes))
    hooks = [Breaking(model.layers[1].down.weight, here=breaks)]
    return hm.Trainer(model, optimizer, [torch.tensor(s) for s in DATA], config, hooks=hooks, schedule=schedule)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_is_that_of_a_loop_with_torchs_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that overflow and steps after which the scale grows, with clipping."""
    monkeypatch.setattr(loss_scale, "INTERVAL", 2)
    trainer_of(tmp_path, max_steps=8).fit()
    metrics = rows(tmp_path)
    torch.manual_seed(7)
    model = Llama(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=8)
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    sampler = Sampler([len(s) for s in DATA], batch_tokens=220, seed=0)
    for row in metrics:
        batch = [torch.tensor(DATA[i]) for i in sampler.next_batch().sequences]
        valid, total, scale = sum(len(s) - 1 for s in batch), 0.0, scaler.get_scale()
        assert row["loss_scale"] == scale
        assert row["learning_rate"] == optimizer.param_groups[0]["lr"]
        for sequence in batch:
            with torch.autocast("cpu", torch.float16):
                logits = model(sequence[None])[0, :-1]
                loss = nn.functional.cross_entropy(logits.float(), sequence[1:], reduction="sum") / valid
            scaler.scale(loss).backward()
            total += float(loss)
        assert row["loss"] == pytest.approx(total, rel=2e-3)
        scaler.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        assert (row["grad_norm"] is None) is not math.isfinite(norm)
        assert row["grad_norm"] is None or row["grad_norm"] == pytest.approx(norm, rel=2e-2)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            schedule.step()
        optimizer.zero_grad()
    scales = [row["loss_scale"] for row in metrics]
    assert any(b < a for a, b in pairwise(scales)), "a step overflowed"
    assert any(b > a for a, b in pairwise(scales)), "the scale grew"


def broken(world: World, folder: Path) -> None:
    """In each mode, up to the step that breaks, and one more step of a resumed run."""
    for number, mode in enumerate(MODES):
        for last in (BROKEN, BROKEN + 1):
            settings = mode | {"clip_norm": 0.5, "checkpoint_every": 1, "keep_checkpoints": 3, "resume": last > BROKEN}
            trainer_of(folder / f"run-{number}", breaks=world.rank == 1, max_steps=last, **settings).fit()


def test_what_overflows_on_one_rank_is_skipped_on_all(tmp_path: Path) -> None:
    run_ranks(2, broken, tmp_path)
    for number in range(len(MODES)):
        run = tmp_path / f"run-{number}"
        first, second, third = rows(run)
        assert first["loss_scale"] == second["loss_scale"] == 2 * third["loss_scale"] == 65536
        assert second["grad_norm"] is None
        assert math.isfinite(second["loss"])
        assert first["learning_rate"] < second["learning_rate"] == third["learning_rate"], "the schedule waits"
        before, after, resumed = (saved(run, step) for step in (1, 2, 3))
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "weights and state"
        assert any(not torch.equal(value, resumed[name]) for name, value in before.items())


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    file = run / f"{step}.pt"
    dcp_to_torch_save(run / f"checkpoints/step-{step:08d}", file)
    everything = torch.load(file, weights_only=True)
    found = {f"model {name}": value for name, value in everything["model"].items()}
    for name, state in everything["optimizer"]["state"].items():
        found |= {f"{name} {key}": value for key, value in state.items()}
    return found


def test_overflow_at_the_least_scale_ends_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, breaks=True, max_steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "LEAST", 65536.0)
        with pytest.raises(
            hm.UserError, match=r"not finite at step 2 even with a loss scale of 65536.*lower the learn"
        ):
            trainer.fit()


def test_precisions_that_cannot_be_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(hm.UserError, match="'int8' and precision is 'fp16'"):
        trainer_of(tmp_path, gradient_compression="int8")
    trainer = trainer_of(tmp_path)
    trainer.model.half()
    with pytest.raises(hm.UserError, match=r"parameter embed.weight is float16: .*keep trained weights in float32"):
        trainer.fit()
    # devices without bf16, and without any 16-bit type
    job: Any = trainer_of(tmp_path, precision="bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    told = job_check._wrong_precision(job, torch.device("cuda", 0))
    assert told.startswith("precision is 'bf16' and Tesla V100 has none: use precision='fp16'")
    monkeypatch.setattr(torch, "autocast", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    assert job_check._wrong_precision(job, torch.device("cpu")).endswith("can't compute in it: use precision='fp32'")
