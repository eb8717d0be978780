"""What the sandbox refuses, and what it decides before it touches the machine."""

import os
import signal
import sys
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Measured, Nic, load_cluster
from heteromesh.runtime.cli.main import main
from heteromesh.runtime.process.variables import CLUSTER_VARIABLE
from heteromesh.runtime.sandbox import machine
from heteromesh.runtime.sandbox.command import Seat
from heteromesh.runtime.sandbox.faults import parse_fault
from heteromesh.runtime.sandbox.network import control_switch, lay_out
from heteromesh.runtime.sandbox.quota import ControlGroups, Controller, find_controller, shares
from heteromesh.runtime.sandbox.scale import scaled_file

ETHERNET = Nic(kind="ethernet", gbit=1)


def cluster(*hosts, **rest):
    return Cluster(name="test", hosts=hosts, devices=CATALOG, **rest)


def host(name, *nics, device="cpu", count=1, fabric=""):
    return Host(name=name, device=device, count=count, nics=nics or (ETHERNET,), fabric=fabric)


def test_cards_of_a_kind_share_a_switch_and_fabrics_have_their_own():
    infiniband, two = Nic(kind="infiniband", gbit=4), Nic(kind="ethernet", gbit=2, count=2)
    placed = lay_out(
        cluster(
            host("a", infiniband, two, fabric="f"),
            host("b", infiniband, ETHERNET, fabric="f"),
            host("c", Nic(kind="roce", gbit=3), ETHERNET, fabric="g"),
        )
    )
    assert [[i.name for i in h] for h in placed] == [["ib0", "eth0", "eth1"], ["ib0", "eth0"], ["roce0", "eth0"]]
    assert [[i.gbit for i in h] for h in placed] == [[4, 2, 2], [4, 1], [3, 1]]
    assert placed[0][0].switch == placed[1][0].switch != placed[2][0].switch
    assert len({i.switch for h in placed for i in h if i.name.startswith("eth")}) == 1
    assert len({i.address for h in placed for i in h}) == 7
    assert control_switch(placed) == placed[0][1].switch
    alone = lay_out(cluster(host("a", infiniband, fabric="f"), host("b", infiniband, fabric="f")))
    assert control_switch(alone) == alone[0][0].switch
    assert control_switch(lay_out(cluster(Host(name="a", device="cpu", count=1)))) == ""


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        ((host("a", Nic(kind="infiniband", gbit=200)),), "NIC of 200 Gbit/s can't be emulated"),
        ((host("a", Nic(kind="ethernet", gbit=1e-5)),), "1e-05 Gbit/s can't be emulated"),
        ((host("a b"),), "host 'a b' can't be named so on Linux"),
        ((host("a/../b"),), "can't be named so"),
        ((host("a", Nic(kind="ethernet", gbit=1, count=17)),), "17 NICs and a sandbox at most 16"),
        (tuple(host(f"n{i}") for i in range(201)), "201 hosts and a sandbox at most 200"),
    ],
)
def test_what_cannot_be_emulated_is_refused(hosts, words):
    with pytest.raises(UserError, match=words):
        lay_out(cluster(*hosts))


def test_shares_follow_speeds_and_leave_a_device_at_most_a_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2)))
    four = cluster(*(host(name) for name in "abcd"), measured=Measured(speeds=(1, 1, 0.5, 0.5)))
    assert shares(four, None) == pytest.approx((0.6, 0.6, 0.3, 0.3))
    assert shares(four, 1.5) == pytest.approx((0.5, 0.5, 0.25, 0.25))
    assert shares(cluster(host("a", count=2), host("b")), 1.5) == pytest.approx((1, 0.5))
    assert shares(cluster(host("a")), None) == (1.0,)
    for cores in (0, -1, 2.5, float("nan")):
        with pytest.raises(UserError, match="more than 0 and at most this machine's 2"):
            shares(four, cores)
    with pytest.raises(UserError, match=r"host 'n0' would get 0\.045 cores and the least quota is 0\.05"):
        shares(cluster(*(host(f"n{i}") for i in range(40))), None)


@pytest.mark.parametrize(
    ("kind", "limit", "version", "files"),
    [
        ("cpu", 0.6, 1, {"cpu.cfs_quota_us": "12000", "cpu.cfs_period_us": "20000"}),
        ("cpu", 0.6, 2, {"cpu.max": "12000 20000"}),
        ("memory", 1.5e9, 1, {"memory.limit_in_bytes": "1500000000"}),
        ("memory", 1.5e9, 2, {"memory.max": "1500000000"}),
    ],
)
def test_limits_are_written_for_both_versions_of_control_groups(tmp_path, kind, limit, version, files):
    (tmp_path / "cgroup.subtree_control").write_text("io")
    controller = Controller(root=tmp_path, version=version, kind=kind)
    ControlGroups("hm-1-0", (limit, 2 * limit), controller).create()
    assert {p.name: p.read_text() for p in (tmp_path / "hm-1-0-0").iterdir()} == files
    assert (tmp_path / "cgroup.subtree_control").read_text() == ("io" if version == 1 else f"+{kind}")


def test_control_groups_that_cannot_be_written_are_refused(tmp_path):
    for kind, way_out in (("cpu", "use --no-quota"), ("memory", "leave --limit-memory out")):
        with pytest.raises(UserError, match=rf"control groups can't be written here .*; {way_out}"):
            ControlGroups("hm-1-0", (0.6,), Controller(root=tmp_path / "none", version=1, kind=kind)).create()


def test_controllers_are_found(tmp_path):
    mounts, unified = tmp_path / "mounts", tmp_path / "unified"
    unified.mkdir()
    (unified / "cgroup.controllers").write_text("hugetlb\n")
    both = f"cgroup /c/cpuset cgroup rw,cpuset 0 0\ncgroup2 {unified} cgroup2 rw 0 0\n"
    mounts.write_text(both + "cgroup /c/cpu cgroup rw,cpu,cpuacct 0 0\n")
    assert find_controller("cpu", mounts) == Controller(root=Path("/c/cpu"), version=1)
    mounts.write_text(both)
    with pytest.raises(UserError, match="no cpu control group is mounted here; use --no-quota"):
        find_controller("cpu", mounts)
    with pytest.raises(UserError, match="no memory control group is mounted here; leave --limit-memory out"):
        find_controller("memory", mounts)
    (unified / "cgroup.controllers").write_text("cpuset cpu io memory\n")
    for kind in ("cpu", "memory"):
        assert find_controller(kind, mounts) == Controller(root=unified, version=2, kind=kind)


def test_faults_are_read():
    two = cluster(host("a0.rack-1"), host("b", ETHERNET, ETHERNET))
    fault = parse_fault(" slow  b/eth1@1.5=0.1:10 ", two)
    assert (fault.action, fault.host, fault.nic, fault.at, fault.gbit, fault.seconds) == (
        "slow",
        "b",
        "eth1",
        1.5,
        0.1,
        10,
    )
    assert parse_fault("kill a0.rack-1@0", two).loses_host
    assert [
        parse_fault(s, two).loses_host for s in ("stop b@1", "stop b@1:2", "cut b@1", "cut b@1:2", "cut b/eth0@1")
    ] == [
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "is not understood: write kill HOST@T"),
        ("explode b@1", "is not understood"),
        ("kill b", "is not understood"),
        ("kill b@-1", "is not understood"),
        ("kill b@soon", "is not understood"),
        ("kill b@1:2", "what is killed stays so"),
        ("kill c@1", "no host 'c': use one of a, b"),
        ("slow b@1", "=GBIT belongs to slow"),
        ("cut b@1=2", "=GBIT belongs to slow"),
        ("slow b@1=0", "0 Gbit/s can't be emulated"),
        ("slow b@1=100", "100 Gbit/s can't be emulated"),
        ("cut b/eth7@1", "no interface 'eth7'"),
        ("stop b/eth0@1", "stop has no interface 'eth0'"),
    ],
)
def test_faults_that_make_no_sense_are_refused(spec, words):
    with pytest.raises(UserError, match=words) as error:
        parse_fault(spec, cluster(host("a"), host("b")))
    assert "\n" not in str(error.value)


def test_a_host_without_a_card_has_no_link_to_cut():
    with pytest.raises(UserError, match="host 'a' has no NIC"):
        parse_fault("cut a@1", cluster(Host(name="a", device="cpu", count=1)))


def seat(**rest):
    return Seat(index=1, devices=2, names=("a", "b"), interface="eth0", master="10.20.0.1", **rest)


@pytest.mark.parametrize(
    ("words", "begin"),
    [
        ("torchrun", ["torchrun"]),
        ("/opt/bin/torchrun", ["/opt/bin/torchrun"]),
        ("python3.11 -m torch.distributed.run", ["python3.11", "-m", "torch.distributed.run"]),
        ("heteromesh run", [sys.executable, "-m", "heteromesh", "run"]),
        ("heteromesh probe", [sys.executable, "-m", "heteromesh", "probe"]),
        ("python -m heteromesh run", ["python", "-m", "heteromesh", "run"]),
        ("python -m heteromesh probe", ["python", "-m", "heteromesh", "probe"]),
    ],
)
def test_launchers_get_a_rendezvous(words, begin):
    flags = ["--nnodes=2", "--nproc-per-node=2", "--node-rank=1", "--rdzv-endpoint=10.20.0.1:29500"]
    assert seat().command([*words.split(), "--nnodes=1:2", "x.py"]) == [*begin, *flags, "--nnodes=1:2", "x.py"]


@pytest.mark.parametrize(
    "words",
    [
        "python x.py",
        "sh -c torchrun",
        "python -m heteromesh plan",
        "python -m heteromesh",
        "heteromesh",
        "echo heteromesh run",
    ],
)
def test_other_commands_are_left_alone(words):
    assert seat().command(words.split()) == words.split()


def test_the_environment_keeps_what_it_had():
    told = seat(cluster_file="/c.toml").environment({"OMP_NUM_THREADS": "4", "X": "y"})
    assert (told["OMP_NUM_THREADS"], told["X"], told[CLUSTER_VARIABLE]) == ("4", "y", "/c.toml")
    assert CLUSTER_VARIABLE not in seat().environment({})


GOOD = """
[[hosts]]
names = ["a", "b"]
device = "cpu"
count = 1
nics = [{ kind = "ethernet", gbit = 1 }]
"""


def refused(capsys, tmp_path, *words, text=GOOD):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sandbox", *(str(path) if w == "FILE" else w for w in words)]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
    told = capsys.readouterr().err
    assert told.startswith("heteromesh: error: ")
    assert told.count("\n") == 1
    return told


def test_the_command_line_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "why_not", lambda: "")
    assert "no COMMAND" in refused(capsys, tmp_path, "FILE")
    assert "no COMMAND" in refused(capsys, tmp_path, "FILE", "--")
    assert "does not exist" in refused(capsys, tmp_path, "none.toml", "--", "true")
    assert "required: CLUSTER" in refused(capsys, tmp_path, "--", "true")
    assert "has no [[hosts]]" in refused(capsys, tmp_path, "FILE", "--", "true", text="hosts = []")
    assert "is not understood" in refused(capsys, tmp_path, "--fault", "kill", "FILE", "--", "true")
    assert "no host 'z'" in refused(capsys, tmp_path, "--fault", "kill z@1", "FILE", "--", "true")
    assert "must be milliseconds" in refused(capsys, tmp_path, "--latency-ms", "-1", "FILE", "--", "true")
    assert "--cores 1e+06 can't be shared out" in refused(capsys, tmp_path, "--cores", "1e6", "FILE", "--", "true")
    assert "'no-such-program' is not found" in refused(capsys, tmp_path, "FILE", "--", "no-such-program")
    assert "unrecognized arguments: true" in refused(capsys, tmp_path, "FILE", "true", "--", "true")
    assert "contradict each other" in refused(capsys, tmp_path, "--cores", "1", "--no-quota", "FILE", "--", "true")
    fast = GOOD.replace("gbit = 1", "gbit = 100")
    told = refused(capsys, tmp_path, "FILE", "--", "true", text=fast)
    assert "100 Gbit/s can't be emulated" in told
    assert "--scale FACTOR" in told
    for factor in ("0", "-1", "nan", "inf", "fast"):
        assert "must be a number greater than 0" in refused(capsys, tmp_path, "--scale", factor, "FILE", "--", "true")
    assert "1e-06 Gbit/s can't be" in refused(capsys, tmp_path, "--scale", "1e8", "FILE", "--", "true", text=fast)


def test_a_scaled_cluster_has_slower_links_and_a_file_of_its_own(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(GOOD.replace("gbit = 1", "gbit = 200") + "[measured]\nnic_gbit = [[180, 190], [170, 160]]\n")
    before = load_cluster(path)
    with scaled_file(before, path, 100) as (cluster, copy):
        assert load_cluster(copy) == cluster
        assert [nic.gbit for h in cluster.hosts for nic in h.nics] == [2, 2]
        assert cluster.measured.nic_gbit == ((1.8, 1.9), (1.7, 1.6))
        assert cluster.devices == before.devices
    assert not copy.exists()
    with scaled_file(before, path, 1) as same:
        assert same == (before, path)


def test_a_machine_that_cannot_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root and this is user 1000: run it with sudo" in refused(capsys, tmp_path, "FILE", "--", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(machine.shutil, "which", lambda tool: None if tool == "tc" else tool)
    assert "needs tc, not found in PATH: install iproute2" in refused(capsys, tmp_path, "FILE", "--", "true")
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert "use a Linux machine" in refused(capsys, tmp_path, "FILE", "--", "true")


def test_kernels_without_namespaces_or_netem_are_told(monkeypatch):
    from heteromesh.runtime.sandbox import network

    def refuse(what):
        def call(*words):
            if what in words:
                raise machine.ToolError("RTNETLINK answers: Operation not permitted")
            return ""

        return call

    monkeypatch.setattr(network, "batch", lambda *words: None)
    monkeypatch.setattr(network, "call", refuse("netns"))
    with pytest.raises(UserError, match=r"makes no network namespaces .*not permitted"):
        network.VirtualNetwork("hm-1-0", lay_out(cluster(host("a"))), 0.0).create()
    monkeypatch.setattr(network, "call", refuse("netem"))
    with pytest.raises(UserError, match=r"latency of 2\.5 ms can't be emulated: this kernel has no netem"):
        network.VirtualNetwork("hm-1-0", lay_out(cluster(host("a"))), 2.5).create()
