"""Trainer over several cards of a host: same losses, same bits; cards that are wrong are named or left alone."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nic_bytes import nic_bytes

import heteromesh as hm
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.comm.world import World as OwnWorld
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.reduction.nics import all_nics_pay, over_all_nics, over_one_nic, several_nics
from heteromesh.runtime.network import nics
from heteromesh.runtime.network.interfaces import Interface
from heteromesh.runtime.network.routes import leaves_by
from heteromesh.runtime.process.failure import PeerLost
from heteromesh.runtime.sandbox import Sandbox, why_not
from heteromesh.runtime.sandbox.process import Process
from heteromesh.runtime.training import build
from llama import Llama
from ranks import World, run_ranks
from steps import TINY

DATA = [torch.tensor([random.Random(i).randrange(TINY.vocab) for _ in range(10 + i % 60)]) for i in range(60)]
CARDS, DEVICES = (2, 1, 3), (1, 1, 2)
"""Of each host; its rates add up to the same."""


def write_cluster(folder: Path, counts: tuple[int, ...] = CARDS, devices: tuple[int, ...] = DEVICES) -> Path:
    hosts = [
        f'[[hosts]]\nnames = ["h{i}"]\ndevice = "cpu"\ncount = {ranks}\n'
        f'nics = [{{ kind = "ethernet", gbit = {1.2 / count}, count = {count} }}]\n'
        for i, (count, ranks) in enumerate(zip(counts, devices, strict=True))
    ]
    path = folder / f"cluster-{'-'.join(map(str, counts))}.toml"
    path.write_text("\n".join(hosts))
    return path


def make_trainer(cluster: Path, folder: Path, **changes: Any) -> hm.Trainer:
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "batch_tokens": 200,
        "max_steps": 6,
        "run_dir": folder,
        "plan_seconds": 0.02,
        "print_plans": 0,
        # the steps are so short that measuring alone could leave a host out
        "idle_hosts": False,
    }
    settings |= {"learning_rate": 3e-3, "cluster": cluster, "timeout_seconds": 20.0}
    return hm.Trainer(Llama(TINY), None, DATA, hm.TrainerConfig(**(settings | changes)))


def train(world: World, cluster: Path, folder: Path, names: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    """(losses, parameters, bytes by card or None, standard error). names: of the cards, {} for the host's number."""
    described = load_cluster(cluster)
    host = described.rank_hosts[world.rank]
    if names:
        count = described.hosts[host].nics[0].count
        os.environ[nics.NICS_VARIABLE] = ",".join(names.format(host, card + 1) for card in range(count))
    used: list[tuple[int, ...]] = []
    close = TcpTransport.close

    def closing(transport: TcpTransport) -> None:
        used.append(nic_bytes(transport, described.rank_hosts))
        close(transport)

    TcpTransport.close = closing  # type: ignore[method-assign]  # this process ends with the test
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        trainer = make_trainer(cluster, folder, **changes)
        losses = trainer.fit().losses
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return losses, flat.numpy().tobytes(), used[0] if used else None, told.getvalue()


@pytest.fixture(scope="module")
def over_one_card_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, ...]:
    """Losses of the same job where every host has one card, so by gloo."""
    folder = tmp_path_factory.mktemp("alone")
    rows = run_ranks(4, train, write_cluster(folder, (1, 1, 1)), folder / "run", "", {})
    assert all(row[2] is None and row[3] == "" for row in rows)
    losses: tuple[float, ...] = rows[0][0]
    assert losses[-1] < losses[0], "it learns"
    return losses


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({}, 1e-5), ({"shard_optimizer": True}, 1e-5), ({"gradient_compression": "int8"}, 0.05)],
    ids=["plain", "sharded", "int8"],
)
def test_the_losses_are_those_of_one_card_and_all_ranks_have_the_same_bits(
    changes: dict[str, Any], tolerance: float, over_one_card_alone: tuple[float, ...], tmp_path: Path
) -> None:
    over = run_ranks(4, train, write_cluster(tmp_path), tmp_path / "cards", "127.0.{}.{}", changes)
    assert over[0][0] == pytest.approx(over_one_card_alone, rel=tolerance)
    assert len({row[1] for row in over}) == 1
    assert all(row[3] == "" for row in over)
    for row, count in zip(over, (2, 1, 3, 3), strict=True):
        assert len(row[2]) == count
        assert min(row[2]) > 0, "each card carries something"


def train_or_refuse(world: World, cluster: Path, folder: Path, names: str) -> str:
    if world.rank == 0:
        os.environ[nics.NICS_VARIABLE] = names
    try:
        make_trainer(cluster, folder).fit()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("127.0.0.1,nosuch7", "HETEROMESH_NICS on host 'h0' names 'nosuch7', which is no interface there"),
        ("127.0.0.1,192.0.2.77", "HETEROMESH_NICS on host 'h0' names '192.0.2.77', which is no interface there"),
        ("127.0.0.1", "HETEROMESH_NICS on host 'h0' is '127.0.0.1' and the cluster file describes 2 Ethernet NICs"),
        ("127.0.0.1,127.0.0.1", "name each once, in the file's order, or describe others"),
    ],
)
def test_cards_that_were_named_wrongly_are_refused_on_every_rank(names: str, sentence: str, tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, (2, 2), (1, 1))
    errors = run_ranks(2, train_or_refuse, cluster, tmp_path / "run", names)
    assert errors[0] == errors[1]
    assert sentence in errors[0]


def test_cards_that_nobody_named_and_that_are_not_there_are_told_once_and_left_alone(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, (7, 7), (1, 1))
    first, second = run_ranks(2, train, cluster, tmp_path / "run", "", {})
    assert first[2] is None
    assert first[1] == second[1]
    assert second[3] == ""
    assert first[3].count("\n") == 1
    start = "heteromesh: gradients are summed over one NIC of each host: the cluster file describes 7 Ethernet NICs"
    assert first[3].startswith(start)
    assert first[3].rstrip().endswith("set HETEROMESH_NICS on it to the NICs' names, as in eth0,eth1")


def test_one_rank_needs_no_cards(tmp_path: Path) -> None:
    ((losses, _, used, told),) = run_ranks(1, train, write_cluster(tmp_path, (2,), (1,)), tmp_path / "run", "x{}{}", {})
    assert len(losses) == 6
    assert used is None
    assert told == ""


def test_all_cards_are_for_where_they_pay(tmp_path: Path) -> None:
    def cluster(*nics: str) -> Any:
        hosts = [f'[[hosts]]\nnames = ["h{i}"]\ndevice = "cpu"\ncount = 1\nnics = [{n}]\n' for i, n in enumerate(nics)]
        (tmp_path / "c.toml").write_text("\n".join(hosts))
        return load_cluster(tmp_path / "c.toml")

    double, single, slow = ('{ kind = "ethernet", gbit = ' + text + " }" for text in ("1, count = 2", "2", "0.2"))
    paying = cluster(double, double, single)
    assert several_nics(paying)
    assert all_nics_pay(paying)
    assert over_all_nics(paying).fractions == pytest.approx((1 / 3,) * 3)
    one = over_one_nic(paying)
    assert one.fractions[2] > one.fractions[0], "the host whose one card is the fastest owns most"
    assert not all_nics_pay(cluster(double, slow)), "the slow host decides"
    assert not all_nics_pay(cluster(single, single))
    assert not all_nics_pay(cluster(double))


def test_the_kernel_says_by_which_interface_packets_leave() -> None:
    assert leaves_by("127.0.0.2", "127.0.0.3") == "lo"
    with pytest.raises(OSError, match=r"unreachable|Invalid"):
        leaves_by("192.0.2.77", "127.0.0.1")


def test_cards_by_which_packets_do_not_leave_are_named(tmp_path: Path) -> None:
    cluster = load_cluster(write_cluster(tmp_path, (1, 1), (1, 1)))
    own, other = (
        nics.HostNics(interfaces=(Interface(name=name, address=address, prefix=8, mbit=None),))
        for name, address in (("eth7", "127.0.0.1"), ("lo", "127.0.0.2"))
    )
    problem = nics._wrong_way(cluster, 0, [own, other])
    assert "on host 'h0' packets from eth7 (127.0.0.1) to 127.0.0.2 of host 'h1' leave by lo" in problem
    assert "ip rule add from" in problem
    assert nics._wrong_way(cluster, 1, [own, other]) == ""
    assert "both have the address 127.0.0.1: describe one machine" in nics._one_machine(cluster, [own, own])


def test_more_connections_than_files_may_be_opened_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    world = OwnWorld(rank=3, size=10)
    monkeypatch.setattr(nics.resource, "getrlimit", lambda _: (1024, 1024))
    assert nics._too_many(world, [2, 2]) == ""
    assert "rank 3 may open 1024 files and all NICs take 576 connections" in nics._too_many(world, [8, 1])


def train_until_one_leaves(world: World, cluster: Path, folder: Path) -> str:
    host = load_cluster(cluster).rank_hosts[world.rank]
    os.environ[nics.NICS_VARIABLE] = f"127.0.{host}.1,127.0.{host}.2"
    trainer = make_trainer(cluster, folder / "run", max_steps=500, checkpoint_every=1)
    if world.rank == 1:

        def leave(*_: object) -> None:
            if (folder / "run/checkpoints/step-00000003").exists():
                os._exit(9)

        trainer.model.register_forward_pre_hook(leave)
    with pytest.raises(PeerLost) as lost:
        trainer.fit()
    (folder / f"{world.rank}.txt").write_text(str(lost.value))
    return str(lost.value)


def test_a_rank_that_dies_is_named_by_the_others(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, (2, 2, 2), (1, 1, 1))
    with pytest.raises(AssertionError, match="rank 1 died with exit code 9"):
        run_ranks(3, train_until_one_leaves, cluster, tmp_path)
    for rank in (0, 2):
        told = (tmp_path / f"{rank}.txt").read_text()
        assert told.startswith("rank 1 (host "), told
        assert "resume=True" in told


SCRIPT = """
import test_trainer_nics
test_trainer_nics.run_in_sandbox(test_trainer_nics.Path({cluster!r}), test_trainer_nics.Path({folder!r}), {steps})
"""


def run_in_sandbox(cluster: Path, folder: Path, steps: int) -> None:
    """Says whether all cards are used, trains, and says which peers were lost."""
    found = build.open_nic_collectives

    def opened(*args: Any) -> Any:
        collectives = found(*args)
        print("over all cards" if collectives else "over one card", flush=True)
        return collectives

    build.open_nic_collectives = opened
    try:
        make_trainer(cluster, folder, max_steps=steps, checkpoint_every=1, timeout_seconds=4.0).fit()
    except PeerLost as lost:
        print(f"lost: {lost}", flush=True)
        os._exit(1)


def start(sandbox: Sandbox, cluster: Path, folder: Path, steps: int) -> list[Process]:
    text = SCRIPT.format(cluster=str(cluster), folder=str(folder), steps=steps)
    environment = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return [
        host.start([sys.executable, "-c", text], environment=environment | {"RANK": str(rank)}, piped=True)
        for rank, host in enumerate(sandbox.hosts)
    ]


def texts(processes: list[Process]) -> list[str]:
    """What the processes have written when they have ended."""
    for process in processes:
        process.wait(150)
    streams = [process.streams for process in processes]
    return ["".join(stream.read().decode() for stream in its) for its in streams if its]


@pytest.mark.alone
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_sandbox_hosts_use_all_cards_tell_a_cut_one_and_a_missing_rule(tmp_path: Path) -> None:
    cluster, folder = write_cluster(tmp_path, (2, 2), (1, 1)), tmp_path / "run"
    with Sandbox(load_cluster(cluster), cluster_file=cluster, quota=False) as sandbox:
        processes = start(sandbox, cluster, folder, 100_000)
        until = time.monotonic() + 60
        while not (folder / "checkpoints/step-00000003").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        sandbox.hosts[1].cut("eth1")
        began = time.monotonic()
        ended = texts(processes)
        for text in ended:
            assert "over all cards" in text
            assert "lost: " in text
            assert "resume=True" in text
        assert any("lost: the connections over all NICs of the hosts failed" in text for text in ended), ended
        assert time.monotonic() - began < 90, "long before the time limit of the process group"
        sandbox.hosts[1].plug("eth1")
        second = sandbox.hosts[1].interfaces[1].address
        subprocess.run(["ip", "-n", sandbox.hosts[1].namespace, "rule", "del", "from", second], check=True)
        again = texts(start(sandbox, cluster, tmp_path / "again", 2))
        assert all("over one card" in text and "lost:" not in text for text in again)
        assert f"on host 'h1' packets from eth1 ({second}) to 10.20.0.1 of host 'h0' leave by eth0" in again[0]
