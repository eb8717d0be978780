"""Ranks whose peers are killed, cut off or stuck end soon, with a sentence that names the peer; resume goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.runtime.process.failure import PeerLost
from heteromesh.runtime.process.peers import _DOING, PeerWatch, _owners
from heteromesh.runtime.sandbox import Sandbox, why_not
from llama import Llama
from ranks import World, run_ranks
from steps import TINY

CLUSTER = """
[[hosts]]
names = ["left", "right"]
device = "cpu"
count = 1
nics = [{ kind = "ethernet", gbit = 1 }]
"""
SCRIPT = """
import test_peers
test_peers.make_trainer(test_peers.Path({folder!r}), max_steps=100000, timeout_seconds=4.0, idle_hosts=False).fit()
"""


class Data:
    """Sequences; a process that reads one when there is a checkpoint of step 3 or later in `fatal` is killed."""

    def __init__(self, fatal: Path | None) -> None:
        self.rows = [torch.tensor([random.Random(i).randrange(TINY.vocab) for _ in range(20)]) for i in range(40)]
        self.fatal = fatal

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.fatal and any(path.name >= "step-00000003" for path in self.fatal.glob("step-????????")):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]


def make_trainer(folder: Path, victim: bool = False, **changes: Any) -> hm.Trainer:
    torch.manual_seed(7)
    settings = {"batch_tokens": 80, "max_steps": 400, "run_dir": folder / "run", "plan_seconds": 0.02}
    settings |= {"checkpoint_every": 1, "print_plans": 0}
    fatal = folder / "run/checkpoints" if victim else None
    return hm.Trainer(Llama(TINY), None, Data(fatal), hm.TrainerConfig(**(settings | changes)))


def train_until_one_is_killed(world: World, folder: Path, victim: int) -> None:
    try:
        make_trainer(folder, victim=world.rank == victim).fit()
    except PeerLost as lost:
        (folder / f"{world.rank}.txt").write_text(str(lost))
        raise


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_all_others_and_the_run_resumes(victim: int, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"rank {victim} died with exit code -9"):
        run_ranks(3, train_until_one_is_killed, tmp_path, victim)
    for rank in {0, 1, 2} - {victim}:
        told = (tmp_path / f"{rank}.txt").read_text()
        assert told.startswith(f"rank {victim} (host "), told
        assert f"ended, seen by rank {rank} (host " in told
        assert "start the run again with resume=True" in told
    done = int(max(p.name for p in (tmp_path / "run/checkpoints").glob("step-????????")).removeprefix("step-"))
    report = make_trainer(tmp_path, resume=True, max_steps=done + 2).fit()
    assert (report.first_step, report.last_step) == (done + 1, done + 2)


def blame(world: World, act: str) -> str:
    try:
        with PeerWatch(world, 5.0, lambda: "do this"):
            if act == "mistake":
                raise UserError("a mistake")
            if act == "own error":
                raise RuntimeError("shapes differ")
            if act == "stuck":
                raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def many(world: World) -> list[str]:
    told = []
    for act in ("", "mistake", "own error", "stuck"):
        told.append(blame(world, act))
        world.barrier()
    return told


def test_errors_that_are_not_a_peers_stay_what_they_are() -> None:
    for rank, (fine, mistake, own, stuck) in enumerate(run_ranks(2, many)):
        assert fine == "fine"
        assert mistake == "UserError: a mistake"
        assert own == "RuntimeError: shapes differ"
        assert stuck.startswith(f"PeerLost: rank {rank} (host ")
        assert stuck.endswith("one is stuck, or timeout_seconds is too short; do this")


def test_addresses_tell_ranks_apart() -> None:
    a, b, local = ("10.0.0.1", 5), ("10.0.0.2", 5), ("127.0.0.1", 7)
    told = [("x", [a, local]), ("y", [b, local]), ("x", [("10.0.0.1", 6), ("127.0.0.1", 8)])]
    assert _owners(told, 0) == {b: 1, ("10.0.0.1", 6): 2, ("127.0.0.1", 8): 2}
    assert _owners(told, 1) == {a: 0, ("10.0.0.1", 6): 2}
    assert _owners(told, 2) == {a: 0, local: 0, b: 1}


def test_one_rank_has_nobody_to_watch() -> None:
    with pytest.raises(RuntimeError, match="mine"), PeerWatch(World(), 5.0, lambda: ""):
        raise RuntimeError("mine")


@pytest.mark.alone
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_cut_cable_ends_both_hosts_and_the_run_resumes(tmp_path: Path) -> None:
    cluster, script = tmp_path / "cluster.toml", tmp_path / "train.py"
    cluster.write_text(CLUSTER)
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    path = os.pathsep.join(p for p in sys.path if p)
    with Sandbox(load_cluster(cluster), cluster_file=cluster, quota=False) as sandbox:
        processes = [
            sandbox[host].start(
                [sys.executable, str(script)],
                environment={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "PYTHONPATH": path},
                piped=True,
            )
            for rank, host in enumerate(("left", "right"))
        ]
        wait_for(tmp_path / "run/checkpoints/step-00000003")
        sandbox["right"].cut()
        began = time.monotonic()
        errors = [communicate(p) for p in processes]
        assert time.monotonic() - began < 90, "long before the time limit of the process group"
        assert [p.poll() for p in processes] == [1, 1]
    for rank, (peer, text) in enumerate(zip(("rank 1 (host right)", "rank 0 (host left)"), errors, strict=True)):
        assert f"heteromesh: error: {peer} has not answered rank {rank} (host " in text
        assert "Traceback" not in text
    done = max(p.name for p in (tmp_path / "run/checkpoints").glob("step-????????"))
    first = int(done.removeprefix("step-")) + 1
    assert make_trainer(tmp_path, resume=True, max_steps=first).fit().first_step == first


def wait_for(path: Path, limit: timedelta = timedelta(seconds=150)) -> None:
    until = time.monotonic() + limit.total_seconds()
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} did not appear"
        time.sleep(0.05)


def communicate(process: Any) -> str:
    """What a process that ends soon has written."""
    try:
        process.wait(150)
    except subprocess.TimeoutExpired:
        process.kill()
    output, error = process.streams
    with output, error:
        return f"{error.read().decode()}\n{output.read().decode()}"


def test_activities_are_named_by_modules_that_exist() -> None:
    assert all(find_spec(module) is not None for module in _DOING)
