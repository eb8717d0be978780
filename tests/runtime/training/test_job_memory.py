"""What a job's memory is predicted to be, beside what it is; weights are sharded where ranks can't hold them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.runtime.process.memory import resident_bytes
from llama import Llama, LlamaConfig
from ranks import World, run_ranks
from trainers import gather_costs

SIZES = LlamaConfig(vocab=2000, layers=8, hidden=384, heads=6, kv_heads=2, intermediate=1536)
"""About 70 MB of weights."""
DATA = [[(7 * i + j) % SIZES.vocab for j in range(20 + (i * 37) % 90)] for i in range(24)]


def write_cluster(folder: Path, gigabytes: tuple[float, float]) -> Path:
    devices = [
        f"[devices.d{i}]\ntflops = 1\nmemory_gb = {size}\nmemory_gbps = 10\nlink_gbps = 1\n"
        for i, size in enumerate(gigabytes)
    ]
    hosts = [
        f'[[hosts]]\nnames = ["h{i}"]\ndevice = "d{i}"\ncount = 1\nnics = [{{ kind = "ethernet", gbit = 10 }}]\n'
        for i in range(2)
    ]
    path = folder / "cluster.toml"
    path.write_text("".join((*devices, *hosts)))
    return path


def trained(folder: Path, **changes: Any) -> tuple[tuple[float, ...], list[float]]:
    torch.manual_seed(3)
    model = Llama(SIZES)
    (folder / "cost.toml").write_text(gather_costs(128))  # measuring takes long
    settings = {
        "cost": folder / "cost.toml",
        "batch_tokens": 260,
        "max_steps": 3,
        "run_dir": folder / "run",
        "idle_hosts": False,
        "print_plans": 0,
    }
    config = hm.TrainerConfig(**settings | changes, plan_seconds=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses = hm.Trainer(model, optimizer, [torch.tensor(s) for s in DATA], config).fit().losses
    return losses, [float(p.detach().double().norm()) for p in model.parameters()]


def in_little_memory(world: World, folder: Path) -> tuple[Any, ...]:
    # what the process holds anyway depends on how it was started
    held = max(world.gather(resident_bytes(world.device))) / 1e9
    cluster = world.once(lambda: write_cluster(folder, (held + 1.2, held + 0.22)))
    return trained(folder, cluster=cluster, shard_weights="auto")


def test_memory_that_is_known_and_short_shards_weights_as_predicted(tmp_path: Path) -> None:
    """The small rank can't hold weights, gradients and state (300 MB), nor half of them beside what it works with."""
    (tmp_path / "alone").mkdir()
    expected = trained(tmp_path / "alone", max_steps=4)
    for losses, _ in run_ranks(2, in_little_memory, tmp_path):
        assert losses == pytest.approx(expected[0][:3], rel=1e-4)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["trainer"]["shard_weights"] is True
    owned = config["ownership"]
    assert owned["fractions"][0] > owned["fractions"][1] > 0
    assert owned["resident_layers"][0] == SIZES.layers > owned["resident_layers"][1]
    assert owned["layers_not_recomputed"][0] == SIZES.layers, "the large rank has room for activations"
    for row in map(json.loads, (tmp_path / "run/plan.jsonl").read_text().splitlines()):
        for rank, most in enumerate(owned["step_tokens"]):
            dealt = sum(sum(p["shards"][p["ranks"].index(rank)]) for p in row["plan"]["passes"] if rank in p["ranks"])
            assert dealt <= most
    for rank in json.loads((tmp_path / "run/memory.json").read_text())["ranks"]:
        predicted = sum(rank["predicted"].values())
        assert 0.9 * predicted < rank["measured"] < 1.1 * predicted
    # its checkpoint was written in several files, from where weights and state were
    assert len(list((tmp_path / "run/checkpoints/step-00000003").glob("__0_*"))) > 1
    losses, norms = trained(tmp_path, resume=True, max_steps=4)
    assert losses == pytest.approx(expected[0][3:], rel=1e-4)
    assert norms == pytest.approx(expected[1], rel=1e-4)


def in_ample_memory(world: World, folder: Path) -> tuple[Any, ...]:
    cluster = world.once(lambda: write_cluster(folder, (8.0, 8.0)))
    return trained(folder, cluster=cluster, max_steps=2)


def test_what_fits_stays_whole(tmp_path: Path) -> None:
    run_ranks(2, in_ample_memory, tmp_path)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["trainer"]["shard_weights"] is False
    assert "ownership" not in config
    for rank in json.loads((tmp_path / "run/memory.json").read_text())["ranks"]:
        predicted = sum(rank["predicted"].values())
        assert 0.85 * predicted < rank["measured"] < 1.15 * predicted


def in_too_little(world: World, folder: Path) -> str:
    cluster = world.once(lambda: write_cluster(folder, (0.3, 0.2)))
    try:
        trained(folder, cluster=cluster)
    except hm.UserError as error:
        return str(error)
    return ""


def test_who_lacks_memory_is_told_on_all_ranks(tmp_path: Path) -> None:
    messages = run_ranks(2, in_too_little, tmp_path)
    assert messages[0] == messages[1]
    assert "does not fit on these ranks even with sharded weights" in messages[0]
    assert "on rank 1 (d1)" in messages[0]
