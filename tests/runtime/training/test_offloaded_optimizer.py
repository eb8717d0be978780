"""A Trainer whose optimizer keeps its state outside the device trains as with torch's own, and goes on from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW
from heteromesh.planner.ownership.offload import plan_offload
from heteromesh.planner.ownership.offload_rates import OffloadMemory, OffloadRates
from llama import Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA, gather_costs

RATES = OffloadRates(host_update=1e9, device_update=1e9, to_device=1e9, to_host=1e9, disk_read=1e9, disk_write=1e9)
SUBGROUP = 4096
ON_DISK = OffloadMemory(device=0, staging=0, host=4 * SUBGROUP * 12, disk=1e9)
"""Host memory for what is on its way from and to the disk, and no more."""


def optimizer_of(kind: str, model: torch.nn.Module, folder: Path) -> torch.optim.Optimizer:
    if kind == "torch":
        return torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    plan = partial(plan_offload, rates=RATES, memory=ON_DISK, subgroup_numel=SUBGROUP) if kind == "disk" else None
    return OffloadedAdamW(model.parameters(), lr=3e-3, plan=plan, state_folder=folder)


def train(world: World, folder: Path, kinds: tuple[str, ...], sharded: bool) -> tuple[float, ...]:
    """Losses of two steps with each of these optimizers, one run after the other."""
    losses: tuple[float, ...] = ()
    for number, kind in enumerate(kinds, 1):
        torch.manual_seed(7)
        model: Any = Llama(TINY)
        config = hm.TrainerConfig(
            batch_tokens=220,
            max_steps=2 * number,
            run_dir=folder / "run",
            resume=number > 1,
            cost=folder / "cost.toml",
            plan_seconds=0.02,
            print_plans=0,
            shard_optimizer=sharded,
        )
        data = [torch.tensor(s) for s in DATA]
        losses += hm.Trainer(model, optimizer_of(kind, model, folder), data, config).fit().losses
    return losses


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (2, True)])
def test_runs_go_on_from_each_others_checkpoints(ranks: int, sharded: bool, tmp_path: Path) -> None:
    found = []
    for kinds in (("torch", "torch", "torch"), ("torch", "host", "disk")):
        folder = tmp_path / "-".join(kinds)
        folder.mkdir()
        (folder / "cost.toml").write_text(gather_costs(128))
        found.append(run_ranks(ranks, train, folder, kinds, sharded)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
