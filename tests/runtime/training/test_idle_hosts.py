"""Hosts whose work would make steps longer wait: the others train as ever, and all have the weights in the end."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.planner import plan as plans
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.report.assemble import build_problem, make_plan
from heteromesh.planner.report.fixes import parse_fixes
from heteromesh.runtime.process.failure import PeerLost
from heteromesh.runtime.process.peers import _sockets
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA, gather_costs

FAST, SLOW = 10.0, 0.001
"""Gbit/s: over the slow one the model's gradients take longer than all passes."""


def write_files(folder: Path, gbit: tuple[float, ...]) -> None:
    (folder / "cost.toml").write_text(gather_costs(128))
    hosts = [
        f'[[hosts]]\nnames = ["h{i}"]\ndevice = "cpu"\ncount = 1\nnics = [{{ kind = "ethernet", gbit = {rate} }}]\n'
        for i, rate in enumerate(gbit)
    ]
    (folder / "cluster.toml").write_text("\n".join(hosts))


def make_trainer(folder: Path, described: bool, **changes: Any) -> hm.Trainer:
    torch.manual_seed(7)
    settings: dict[str, Any] = {"batch_tokens": 220, "max_steps": 4, "run_dir": folder / "run", "plan_seconds": 0.02}
    settings |= {"print_plans": 0, "cost": folder / "cost.toml", "timeout_seconds": 30.0}
    settings |= {"cluster": folder / "cluster.toml"} if described else {}
    data = [torch.tensor(s) for s in DATA]
    return hm.Trainer(Llama(TINY), None, data, hm.TrainerConfig(**(settings | changes)))


def train(world: World, folder: Path, changes: dict[str, Any]) -> tuple[Any, ...]:
    trainer = make_trainer(folder, world.size > 1, **changes)
    report = trainer.fit()
    weights = [p.detach().double().sum().item() for p in trainer.model.parameters()]
    shapes = [tuple(p.shape) for p in trainer.model.parameters()]
    return report.losses, weights, shapes


def working(folder: Path) -> set[int]:
    """Ranks that plans name."""
    lines = (folder / "run" / "plan.jsonl").read_text().splitlines()
    return {rank for line in lines for p in json.loads(line)["plan"]["passes"] for rank in p["ranks"]}


@pytest.mark.parametrize("sharded", ["", "shard_optimizer", "shard_weights"])
def test_a_slow_host_waits_and_has_the_weights(tmp_path: Path, sharded: str) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    for folder in (one, three):
        folder.mkdir()
        write_files(folder, (FAST, SLOW, FAST))
    expected = run_ranks(1, train, one, {})[0]
    found = run_ranks(3, train, three, {sharded: True} if sharded else {})
    chosen = json.loads((three / "run" / "config.json").read_text())["participation"]
    assert chosen["ranks"] == [0, 2]
    assert chosen["seconds"] < 0.9 * chosen["everyone_seconds"]
    assert working(three) == {0, 1}  # of the two that work
    for losses, weights, shapes in found:
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert weights == pytest.approx(expected[1], rel=1e-4, abs=1e-4)
        assert shapes == expected[2]
    assert found[0][1] == found[1][1] == found[2][1]


def train_from_meta(world: World, folder: Path) -> tuple[tuple[float, ...], int]:
    trainer = make_trainer(folder, world.size > 1, shard_weights=True)
    with torch.device("meta"):
        model = Llama(TINY)
    report = hm.Trainer(model, None, trainer.data, trainer.config).fit()
    return report.losses, sum(p.numel() for p in model.layers.parameters())


def test_a_host_that_waits_never_has_weights_that_are_dealt_out_from_the_start(tmp_path: Path) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    for folder in (one, three):
        folder.mkdir()
        write_files(folder, (FAST, SLOW, FAST))
    expected, whole = run_ranks(1, train_from_meta, one)[0]
    assert whole > 0
    for losses, left in run_ranks(3, train_from_meta, three):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert left == 0
    assert working(three) == {0, 1}


def resumed(world: World, folder: Path) -> tuple[float, ...]:
    first = make_trainer(folder, True, max_steps=2, checkpoint_every=2).fit().losses
    return first + make_trainer(folder, True, checkpoint_every=2, resume=True).fit().losses


def test_one_rank_that_works_saves_and_resumes(tmp_path: Path) -> None:
    write_files(tmp_path, (SLOW, SLOW))
    reference = tmp_path / "reference"
    reference.mkdir()
    write_files(reference, (FAST,))
    expected = run_ranks(1, train, reference, {})[0][0]
    for losses in run_ranks(2, resumed, tmp_path):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_all_work_where_the_user_says_so(tmp_path: Path) -> None:
    write_files(tmp_path, (FAST, SLOW))
    run_ranks(2, train, tmp_path, {"idle_hosts": False, "max_steps": 2})
    assert working(tmp_path) == {0, 1}


def write_plan(folder: Path, steps: int) -> None:
    """What `heteromesh plan` would say of the first steps."""
    spec = ModelSpec(
        name="tiny",
        layers=TINY.layers,
        hidden=TINY.hidden,
        heads=TINY.heads,
        kv_heads=TINY.kv_heads,
        head_dim=TINY.hidden // TINY.heads,
        intermediate=TINY.intermediate,
        vocab=TINY.vocab,
    )
    problem = build_problem(load_cluster(folder / "cluster.toml"), spec, None, parse_fixes(["max_degree=1"]))
    sampler = Sampler([len(s) for s in DATA], batch_tokens=220, seed=0)
    batches = [sampler.next_batch().lengths for _ in range(steps)]
    plans.dump(make_plan(problem, batches, time_limit=0.02), folder / "plan.json")


def test_a_plan_file_says_who_works(tmp_path: Path) -> None:
    write_files(tmp_path, (FAST, SLOW, FAST))
    write_plan(tmp_path, steps=2)
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["layout"]["ownership"]["working"] == [0, 2]
    changes = {"plan": tmp_path / "plan.json", "max_steps": 2, "tokens_per_device": 4096}
    results = run_ranks(3, train, tmp_path, changes)
    assert working(tmp_path) == {0, 1}
    assert results[0] == results[1] == results[2]


def failing(world: World, folder: Path) -> None:
    trainer, heard = make_trainer(folder, True), folder / "heard"

    def raise_in_step_two(*_: object) -> None:
        metrics = folder / "run" / "metrics.jsonl"
        if metrics.exists() and metrics.read_text():
            raise ValueError("a hook of the model")

    if world.rank == 0:
        trainer.model.layers[0].register_forward_pre_hook(raise_in_step_two)
    try:
        trainer.fit()
    except PeerLost as error:
        heard.write_text(str(error))
    except ValueError:
        for connection in _sockets():  # as at the end of the process
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        while not heard.exists():
            time.sleep(0.05)
    os._exit(0)


def test_a_failure_of_those_that_work_ends_the_wait(tmp_path: Path) -> None:
    write_files(tmp_path, (FAST, SLOW))
    with pytest.raises(AssertionError, match="died with exit code 0"):
        run_ranks(2, failing, tmp_path)
    assert (tmp_path / "heard").read_text().startswith("rank 0 (host ")
