"""The plan says on which tier AdamW's moments lie, and the Trainer keeps them there."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.comm.world import World
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW, check_offloadable
from heteromesh.parallel.state.offload.state_file import StateFile
from heteromesh.runtime.hooks.api import Hook, StepCommitted
from heteromesh.runtime.process.memory import resident_bytes
from heteromesh.runtime.records.checkpoint_files import damage
from heteromesh.runtime.sandbox.quota import find_controller
from llama import Llama, LlamaConfig
from ranks import run_processes, run_ranks
from trainers import gather_costs

SMALL = LlamaConfig(vocab=200, layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128)
LARGE = LlamaConfig(vocab=500, layers=6, hidden=512, heads=8, kv_heads=2, intermediate=1536)
"""18 M parameters: 75 MB of weights, as much of gradients, 150 MB of state."""
CPU = torch.device("cpu")


def trainer(folder: Path, sizes: LlamaConfig = SMALL, hooks: tuple[Hook, ...] = (), **changes: Any) -> hm.Trainer:
    torch.manual_seed(3)
    model = Llama(sizes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.toml").write_text(gather_costs(128))  # measuring takes long
    settings: dict[str, Any] = {"cost": folder / "cost.toml", "batch_tokens": 200, "max_steps": 3, "print_plans": 0}
    config = hm.TrainerConfig(**settings | {"run_dir": folder / "run", "plan_seconds": 0.02} | changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)
    data = [torch.tensor([(7 * i + j) % sizes.vocab for j in range(20 + (i * 37) % 60)]) for i in range(24)]
    return hm.Trainer(model, optimizer, data, config, schedule=schedule, hooks=hooks)


def trained(folder: Path, sizes: LlamaConfig = SMALL, **changes: Any) -> tuple[tuple[float, ...], list[float]]:
    made = trainer(folder, sizes, **changes)
    losses = made.fit().losses
    return losses, [float(p.detach().double().norm()) for p in made.model.parameters()]


def document(folder: Path, name: str) -> Any:
    return json.loads((folder / "run" / name).read_text())


# -- auto


@contextmanager
def group_of_memory(extra: float) -> Iterator[None]:
    """This process in a control group that limits it to what it holds now and so many bytes."""
    controller = find_controller("memory")
    group = controller.root / f"heteromesh-test-{os.getpid()}"
    group.mkdir()
    try:
        controller.limit(group, resident_bytes(CPU) + extra)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (controller.root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def in_a_group(index: int, folder: Path) -> tuple[float, ...]:
    torch.set_num_threads(1)
    with group_of_memory(1.85 * 150e6):
        return trained(folder, LARGE)[0]


def groups_can_be_made() -> bool:
    try:
        return os.access(find_controller("memory").root, os.W_OK) and os.geteuid() == 0
    except hm.UserError:
        return False


@pytest.mark.skipif(not groups_can_be_made(), reason="no control group of memory can be made here")
def test_state_that_exceeds_a_control_groups_memory_trains_from_the_disk(tmp_path: Path) -> None:
    """Weights, gradients and state are 300 MB; there are 278 MB, less 5 % of all."""
    (losses,) = run_processes(1, in_a_group, tmp_path / "limited")
    assert losses == pytest.approx(trained(tmp_path / "whole", LARGE)[0], rel=1e-5)
    (tiers,) = document(tmp_path / "limited", "config.json")["optimizer_tiers"]
    assert 0.2 < tiers["disk"] < 1.0, "as much of it as must"
    assert tiers["device"] == pytest.approx(1 - tiers["disk"])
    (rank,) = document(tmp_path / "limited", "memory.json")["ranks"]
    assert rank["moments"]["disk"] == pytest.approx(tiers["disk"] * sum(rank["moments"].values()))
    predicted = sum(rank["predicted"].values())
    assert 0.9 * predicted < rank["measured"] < 1.1 * predicted
    assert "optimizer_tiers" not in document(tmp_path / "whole", "config.json")
    assert not (tmp_path / "limited/run/offload").exists()


def cluster_of(folder: Path, gigabytes: tuple[float, ...]) -> Path:
    parts = []
    for number, size in enumerate(gigabytes):
        parts += [f"[devices.d{number}]\ntflops = 1\nmemory_gb = {size}\nmemory_gbps = 10\nlink_gbps = 1\n"]
    for number in range(len(gigabytes)):
        nics = '[{ kind = "ethernet", gbit = 10 }]'
        parts += [f'[[hosts]]\nnames = ["h{number}"]\ndevice = "d{number}"\ncount = 1\nnics = {nics}\n']
    path = folder / "cluster.toml"
    path.write_text("".join(parts))
    return path


def in_little_memory(world: World, folder: Path, extra: tuple[float, ...], changes: Mapping[str, Any]) -> Any:
    held = max(world.gather(resident_bytes(world.device))) / 1e9
    cluster = world.once(lambda: cluster_of(folder, tuple(held + each for each in extra)))
    try:
        return trained(folder, LARGE, cluster=cluster, idle_hosts=False, **changes)
    except hm.UserError as error:
        return str(error)


def test_ranks_that_can_not_even_hold_parts_move_as_much_of_the_state_as_must(tmp_path: Path) -> None:
    """Beside what a process holds they have 0.44 GB for 300 MB and what they work with."""
    expected = trained(tmp_path / "alone", LARGE)
    for losses, norms in run_ranks(2, in_little_memory, tmp_path, (0.26, 0.2), {}):
        assert losses == pytest.approx(expected[0], rel=1e-4)
        assert norms == pytest.approx(expected[1], rel=1e-4)
    config = document(tmp_path, "config.json")
    assert config["trainer"]["shard_weights"] is True
    assert all(0.1 < tiers["disk"] < 0.9 for tiers in config["optimizer_tiers"])
    for rank in document(tmp_path, "memory.json")["ranks"]:
        predicted = sum(rank["predicted"].values())
        assert 0.9 * predicted < rank["measured"] < 1.12 * predicted


@pytest.mark.parametrize("changes", [{}, {"shard_weights": False}])
def test_no_set_of_tiers_that_holds_the_model_is_told_on_all_ranks(tmp_path: Path, changes: dict[str, Any]) -> None:
    first, second = run_ranks(2, in_little_memory, tmp_path, (0.02, 0.02), changes)
    assert first == second
    assert "GB on rank 0" in first
    assert (
        "no set of tiers holds the model" in first or "does not fit on these ranks even with sharded weights" in first
    )


# -- as the user says


def on_disk(world: World, folder: Path, changes: Mapping[str, Any]) -> Any:
    return trained(folder, offload_optimizer="disk", **changes)


@pytest.mark.parametrize("changes", [{"shard_optimizer": True}, {"shard_weights": True, "precision": "bf16"}])
def test_parts_of_the_state_lie_on_disk(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = trained(tmp_path / "alone", **{k: v for k, v in changes.items() if k == "precision"})
    (tmp_path / "ranks").mkdir()
    for losses, norms in run_ranks(2, on_disk, tmp_path / "ranks", changes):
        assert losses == pytest.approx(expected[0], rel=1e-4)
        assert norms == pytest.approx(expected[1], rel=1e-4)
    assert [tiers["disk"] for tiers in document(tmp_path / "ranks", "config.json")["optimizer_tiers"]] == [1.0, 1.0]


def test_host_memory_is_a_cpu_devices_own_and_nothing_changes(tmp_path: Path) -> None:
    trained(tmp_path, offload_optimizer="host")
    assert "optimizer_tiers" not in document(tmp_path, "config.json")
    (rank,) = document(tmp_path, "memory.json")["ranks"]
    assert rank["moments"]["device"] > 0 == rank["moments"]["host"] == rank["moments"]["disk"]


class AfterStep(Hook):
    """Calls something after a step."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self._number, self._act = number, act

    def step_committed(self, step: StepCommitted) -> None:
        if step.metrics.step == self._number:
            self._act()


def test_what_is_stopped_leaves_a_checkpoint_and_no_scratch_file(tmp_path: Path) -> None:
    files: list[int] = []

    def stop() -> None:
        files.append(len(list((tmp_path / "run/offload").iterdir())))
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        trainer(tmp_path, hooks=(AfterStep(2, stop),), max_steps=4, offload_optimizer="disk").fit()
    assert files == [1]
    assert not (tmp_path / "run/offload").exists()
    losses = trained(tmp_path, max_steps=4, resume=True, offload_optimizer="disk")[0]
    assert losses == pytest.approx(trained(tmp_path / "whole", max_steps=4)[0][-len(losses) :], rel=1e-5)


def test_files_of_a_run_that_was_killed_are_removed_by_one_that_needs_none(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "run/offload", 1, 10)
    file._close.detach()  # as if it had not come to that
    os.close(file._file)
    trained(tmp_path, max_steps=1)
    assert not (tmp_path / "run/offload").exists()


def test_disk_that_fails_in_an_update_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = os.pwritev, []

    def pwritev(*args: Any) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(os, "pwritev", pwritev)
    made = trainer(
        tmp_path, hooks=(AfterStep(2, lambda: full.append(1)),), checkpoint_every=2, offload_optimizer="disk"
    )
    with pytest.raises(
        hm.UserError, match=r"can't be written \(No space left on device\).*resume from the last checkp"
    ):
        made.fit()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert not damage(tmp_path / "run/checkpoints/step-00000002")
    assert not (tmp_path / "run/offload").exists()
    full.clear()
    losses = trained(tmp_path, resume=True, offload_optimizer="disk")[0]
    assert losses == pytest.approx(trained(tmp_path / "whole")[0][2:], rel=1e-5)


def test_too_little_space_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("heteromesh.runtime.memory.offload.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(hm.UserError, match=r"rank 0 has 0.001 GB of optimizer state for the disk .* 0.000 GB free"):
        trained(tmp_path, offload_optimizer="disk")
    assert not (tmp_path / "run/offload").exists()


def parameter(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(4, dtype=dtype))]


class MyAdamW(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.SGD(parameter(), lr=0.1), "SGD can't be offloaded: it is for torch.optim.AdamW alone"),
        (lambda: MyAdamW(parameter()), "MyAdamW can't be offloaded"),
        (lambda: OffloadedAdamW(parameter()), "OffloadedAdamW has a plan of its own"),
        (lambda: torch.optim.AdamW(parameter(), amsgrad=True), "amsgrad=True"),
        (lambda: torch.optim.AdamW(parameter(torch.bfloat16)), "keep weights in fp32"),
    ],
)
def test_optimizers_that_can_not_be_offloaded_are_named(
    make: Callable[[], torch.optim.Optimizer], message: str
) -> None:
    with pytest.raises(hm.UserError, match=message):
        check_offloadable(make())


def test_what_can_not_be_offloaded_is_refused_if_asked_and_told_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path, offload_optimizer="disk")
    made.optimizer, made.schedule = torch.optim.SGD(made.model.parameters(), lr=0.1, momentum=0.9), None
    with pytest.raises(hm.UserError, match="SGD can't be offloaded"):
        made.fit()
    monkeypatch.setattr("heteromesh.runtime.memory.replicated.memory_limit", lambda: (1e8, "a group"))
    monkeypatch.setattr("heteromesh.runtime.memory.offload.memory_limit", lambda: (1e8, "a group"))
    made = trainer(tmp_path / "auto")
    made.optimizer, made.schedule = torch.optim.SGD(made.model.parameters(), lr=0.1, momentum=0.9), None
    made.fit()
    assert "the job may run out of memory" in capsys.readouterr().out


def test_a_tier_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        hm.UserError, match=r"offload_optimizer is 'cpu': it must be 'auto', 'none', 'host' \(DeepSpeed"
    ):
        hm.TrainerConfig(batch_tokens=1, max_steps=1, run_dir=tmp_path, offload_optimizer="cpu")  # type: ignore[arg-type]
