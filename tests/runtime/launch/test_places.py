"""Which ranks of the job a host's processes are, and by which NICs they are reached."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster, load_cluster
from heteromesh.runtime.launch.places import first_place, host_index, nic_addresses

HOST = '[[hosts]]\nnames = ["{name}"]\ndevice = "small"\ncount = {count}\nnics = [{nics}]\n'
NIC = '{ kind = "ethernet", gbit = 1 }'


def cluster(folder: Path, *hosts: tuple[str, int], nics: int = 1) -> Cluster:
    device = "[devices.small]\ntflops = 1\nmemory_gb = 4\nmemory_gbps = 10\nlink_gbps = 1\n"
    file = folder / "cluster.toml"
    cards = ", ".join([NIC] * nics)
    file.write_text(device + "".join(HOST.format(name=name, count=count, nics=cards) for name, count in hosts))
    return load_cluster(file)


@pytest.mark.parametrize(
    ("node_rank", "one_host", "expected"), [(None, True, 0), (1, False, 1), (None, False, 2), (0, False, 0)]
)
def test_a_host_is_found_by_number_or_name(
    node_rank: int | None, one_host: bool, expected: int, tmp_path: Path
) -> None:
    described = cluster(tmp_path, ("a", 1), ("b", 2), (socket.gethostname(), 1))
    assert host_index(described, node_rank, one_host=one_host) == expected


def test_a_host_that_nobody_described_is_nowhere(tmp_path: Path) -> None:
    assert host_index(cluster(tmp_path, ("a", 1), ("b", 2)), None, one_host=False) is None
    assert host_index(None, None, one_host=False) is None
    assert host_index(None, 3, one_host=False) == 3, "the user knows better than no file"


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_the_file_does_not_have_is_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--node-rank {number} is no host of the cluster file, which has 2"):
        host_index(cluster(tmp_path, ("a", 1), ("b", 2)), number, one_host=False)


def test_places_follow_the_file_with_unequal_hosts(tmp_path: Path) -> None:
    described = cluster(tmp_path, ("a", 1), ("b", 3), ("c", 2))
    assert [first_place(described, host, 1) for host in range(3)] == [0, 1, 4]
    assert first_place(None, 2, 4) == 8, "without a file all hosts are taken to have as many processes"
    assert first_place(described, None, 1) is None


def test_more_processes_than_devices_are_refused_unless_all_ranks_are_here(tmp_path: Path) -> None:
    described = cluster(tmp_path, ("a", 1), ("b", 2))
    with pytest.raises(UserError, match="--nproc-per-node 2 is more than the 1 devices of host 'a'"):
        first_place(described, 0, 2)
    assert first_place(described, 0, 3) == 0


@pytest.mark.parametrize("host", [None, 0])
def test_one_nic_is_the_address_that_was_found(host: int | None, tmp_path: Path) -> None:
    found: Sequence[str] = ["10.0.0.1"]
    assert nic_addresses(cluster(tmp_path, ("a", 1)), host, found) == found
    assert nic_addresses(None, host, found) == found


def test_named_nics_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETEROMESH_NICS", "nosuch0,nosuch1")
    with pytest.raises(UserError, match="nosuch0"):
        nic_addresses(cluster(tmp_path, ("a", 1), nics=2), 0, ["10.0.0.1"])


def test_unnamed_nics_that_are_not_there_leave_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HETEROMESH_NICS", raising=False)
    assert nic_addresses(cluster(tmp_path, ("a", 1), nics=7), 0, ["10.0.0.1"]) == ["10.0.0.1"]
    assert "one NIC of this host is used" in capsys.readouterr().err
