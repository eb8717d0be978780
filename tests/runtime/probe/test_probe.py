"""Probe without a network: fits, schedules, outliers, names, cgroups, and the file that it writes."""

import random
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic, load_cluster
from heteromesh.planner.cluster.files import cluster_toml
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.measured import measured_costs
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.sequences.step import plan_step
from heteromesh.runtime.network.fit import fit_alpha_beta
from heteromesh.runtime.network.interfaces import Interface, interfaces
from heteromesh.runtime.network.measure import HostPair, LocalPair, Network
from heteromesh.runtime.network.tournament import tournament
from heteromesh.runtime.probe.assemble import assemble
from heteromesh.runtime.probe.devices import nvidia
from heteromesh.runtime.probe.devices.compute import Compute
from heteromesh.runtime.probe.devices.device import catalogue_name
from heteromesh.runtime.probe.devices.facts import Facts, cpu_model, cpu_quota, host_memory
from heteromesh.runtime.probe.findings import Findings, find_outliers, group_hosts, host_names
from heteromesh.runtime.probe.model.costs import extrapolate
from heteromesh.runtime.probe.model.decoder import Decoder
from heteromesh.runtime.probe.outliers import Reading, outliers


@given(st.integers(0, 5), st.floats(1e-5, 1e-3), st.floats(1e6, 1e10))
def test_fit_finds_the_line_in_noise(seed: int, alpha: float, rate: float) -> None:
    draw = np.random.default_rng(seed)
    sizes = np.repeat(np.array([0.05, 0.1, 0.2, 0.4]) * rate, 3)
    seconds = (alpha + sizes / rate) * draw.normal(1, 0.01, len(sizes))
    line = fit_alpha_beta(sizes.tolist(), seconds.tolist())
    assert line.bytes_per_second == pytest.approx(rate, rel=0.05)
    assert abs(line.alpha - alpha) < 0.005
    assert 0.98 < line.r2 <= 1


def test_fit_keeps_what_a_token_bucket_lets_through_out_of_the_rate() -> None:
    sizes = [1e5, 2e5, 4e5, 8e5]
    line = fit_alpha_beta(sizes, [(s - 65536) / 25e6 for s in sizes])
    assert line.bytes_per_second == pytest.approx(25e6)
    assert line.alpha == pytest.approx(-65536 / 25e6)


def test_fit_of_noise_or_of_one_size_is_the_largest_messages_rate() -> None:
    assert fit_alpha_beta([10, 100], [2.0, 1.0]).bytes_per_second == 100
    assert fit_alpha_beta([100], [2.0]).bytes_per_second == 50
    # a stall in one of four would make the slope anything
    stalled = fit_alpha_beta([10, 20, 40, 80], [0.1, 0.85, 0.4, 0.8])
    assert (stalled.bytes_per_second, stalled.alpha) == (100, 0)
    assert stalled.r2 < 0.9
    with pytest.raises(ValueError, match="not empty"):
        fit_alpha_beta([], [])


@pytest.mark.parametrize("players", range(1, 14))
def test_everyone_meets_everyone_once_and_nobody_twice_a_round(players: int) -> None:
    rounds = tournament(players)
    assert sorted(pair for turn in rounds for pair in turn) == list(combinations(range(players), 2))
    for turn in rounds:
        met = [player for pair in turn for player in pair]
        assert len(met) == len(set(met))
    if players > 1:
        assert len(rounds) == players - 1 + players % 2


def reading(subject: str, value: float, kind: str = "T4") -> Reading:
    return Reading(subject=subject, verb="runs at", kind=kind, value=value, unit="GB/s")


def test_slower_than_four_fifths_of_its_class_is_named_in_a_sentence() -> None:
    fine = [reading("a", 10), reading("b", 10.4), reading("c", 8.1)]
    assert outliers(fine) == ()
    assert outliers([*fine, reading("d", 1, kind="L4")]) == ()
    assert outliers([*fine, reading("d", 7.3)]) == ()  # 0.81 of 9.05
    assert outliers([*fine, reading("d", 4)]) == ("d runs at 4 GB/s, 0.44 of the 9.05 GB/s that is the median of T4",)


@pytest.mark.parametrize(
    ("maker", "gb", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 42.4, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 85.2, "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", 85.2, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", 85.0, "H100-80GB"),
        ("NVIDIA H100 PCIe", 85.0, "H100-PCIe-80GB"),
        ("NVIDIA GeForce RTX 4090", 25.3, "RTX-4090"),
        ("NVIDIA L40S", 47.7, "L40S"),
        ("Tesla V100-SXM2-32GB", 34.1, "V100-32GB"),
        ("NVIDIA A10", 23.6, "A10-24GB"),
        ("NVIDIA RTX A6000", 51.0, "RTX-A6000"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5.1, None),
        ("NVIDIA GeForce GTX 1080", 8.5, None),
        ("amd-epyc-1c", 12.6, None),
    ],
)
def test_makers_names_are_found_in_the_catalogue(maker: str, gb: float, name: str | None) -> None:
    assert catalogue_name(maker, gb * 1e9) == name


def test_cpu_quotas_of_both_versions(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert cpu_quota(tmp_path / "none", groups) is None
    (proc / "self/cgroup").write_text("4:memory:/a\n1:cpu,cpuacct:/job/one\n0::/\n")
    (groups / "cpu,cpuacct/job/one").mkdir(parents=True)
    assert cpu_quota(proc, groups) is None
    for group, quota in (("job/one", 250_000), ("job", 150_000), ("", -1)):
        (groups / "cpu,cpuacct" / group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (groups / "cpu,cpuacct" / group / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(proc, groups) == 1.5
    (proc / "self/cgroup").write_text("0::/pod/inner\n")
    (groups / "pod/inner").mkdir(parents=True)
    (groups / "pod/cpu.max").write_text("50000 100000\n")
    (groups / "pod/inner/cpu.max").write_text("max 100000\n")
    assert cpu_quota(proc, groups) == 0.5


def test_facts_of_a_machine(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Chip(R) 9000 @ 3GHz\n")
    assert cpu_model(tmp_path) == "Chip(R) 9000 @ 3GHz"
    assert cpu_model(tmp_path / "none")
    assert host_memory(cgroups=tmp_path) > 1e8
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory(cgroups=tmp_path) == 1e6
    assert all(i.address and not i.address.startswith("127.") for i in interfaces())
    assert Interface(name="e", address="10.1.2.3", prefix=24, mbit=None).network.prefixlen == 24


def test_nvidia_facts_survive_what_a_device_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def unknown(*_: object) -> int:
        raise NVMLError

    library = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_NVLINK_MAX_LINKS=3,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetName=lambda handle: b"NVIDIA T4",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=16 << 30),
        nvmlDeviceGetCurrPcieLinkGeneration=lambda handle: 3,
        nvmlDeviceGetCurrPcieLinkWidth=lambda handle: 8,
        nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: 3,
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 16,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x20 | 0x4,
        nvmlDeviceGetClockInfo=lambda handle, kind: 900,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1590,
        nvmlDeviceGetNvLinkState=unknown,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    facts = nvidia.nvidia_facts(torch.device("cuda", 0))
    assert facts is not None
    assert (facts.name, facts.pcie, facts.nvlinks, facts.sm_mhz) == ("NVIDIA T4", "gen3 x8 of gen3 x16", 0, 900)
    assert facts.held_back_by == ("heat", "its power limit")
    library.nvmlDeviceGetHandleByUUID = unknown
    assert nvidia.nvidia_facts(torch.device("cuda", 0)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvidia.nvidia_facts(torch.device("cuda", 0)) is None


def found(hosts: tuple[tuple[int, ...], ...], rates: list[float], tflops: list[float]) -> Findings:
    """Made-up findings: rates in bytes/s per host, TFLOP/s per rank."""
    ranks = sum(map(len, hosts))
    line = fit_alpha_beta([1e6, 2e6], [1.0, 2.0])
    between = tuple(
        HostPair(
            hosts=(a, b), latency=1e-4, forward=min(rates[a], rates[b]), backward=min(rates[a], rates[b]),
            both=min(rates[a], rates[b]), line=line,
        )
        for a, b in combinations(range(len(hosts)), 2)
    )  # fmt: skip
    local = tuple(
        LocalPair(ranks=pair, latency=1e-5, both=2e9, line=line) for h in hosts for pair in combinations(h, 2)
    )
    facts = tuple(
        Facts(
            host=str(h), hostname="node", local_rank=i, local_ranks=len(members), device="some-cpu-1c",
            memory_bytes=8e9, cores=1, quota=None, threads=1, nvidia=None,
            interfaces=(Interface(name="e0", address=f"10.0.0.{h + 1}", prefix=24, mbit=1000),),
        )
        for h, members in enumerate(hosts) for i, _ in enumerate(members)
    )  # fmt: skip
    outgoing = tuple(rates) if len(hosts) > 1 else ()
    return Findings(
        facts=facts,
        compute=tuple(Compute(tflops={"bf16": t, "fp32": t / 2}, memory_gbps=10, busy_cores=1) for t in tflops),
        network=Network(hosts=hosts, local=local, between=between, out=outgoing, into=outgoing, together=None),
        cards=(),
        names=host_names(["node"] * len(hosts)),
        kinds=("some-cpu-1c",) * ranks,
        nominal_gbit=(1.0,) * len(hosts),
    )


def loaded(cluster: Cluster, folder: Path) -> Cluster:
    path = folder / "cluster.toml"
    path.write_text(cluster_toml(cluster, "two\nlines"))
    return load_cluster(path)


def test_what_was_found_becomes_a_file_that_plans(tmp_path: Path) -> None:
    findings = found(((0, 1), (2, 3), (4,)), [1.25e8, 1.25e8, 2.5e7], [0.1, 0.1, 0.1, 0.05, 0.1])
    cluster = loaded(assemble(findings, None, "lab"), tmp_path)
    assert [(h.name, h.count, h.nics[0].gbit) for h in cluster.hosts] == [
        ("node-0", 2, 1.0), ("node-1", 2, 1.0), ("node-2", 1, 0.2),
    ]  # fmt: skip
    assert cluster.devices["some-cpu-1c"].tflops == 0.1
    assert cluster.speeds() == (1, 1, 1, 0.5, 1)
    assert cluster.measured.nic_gbit == ((1.0, 1.0), (1.0, 1.0), (0.2, 0.2))
    assert cluster.measured.link_gbps == (2.0, 2.0, 5.0)
    links = cluster_links(cluster)
    assert links((0, 1)) == pytest.approx(2e9)
    assert links((0, 4)) == pytest.approx(2.5e7)
    sentences = find_outliers(findings)
    assert any(s.startswith("rank 3 on node-1 multiplies matrices at 0.05 TFLOP/s, 0.50") for s in sentences)
    assert any(s.startswith("node-2 sends 0.2 Gbit/s, 0.20 of the 1 Gbit/s") for s in sentences)


def test_an_old_file_gives_names_kinds_and_fabrics(tmp_path: Path) -> None:
    old = tmp_path / "old.toml"
    old.write_text(
        'name = "old"\n[[hosts]]\nnames = ["x", "y"]\ndevice = "T4"\ncount = 1\nfabric = "f"\n'
        'nics = [{ kind = "roce", gbit = 25 }]\n'
    )
    cluster = loaded(assemble(found(((0,), (1,)), [2e9, 1e9], [1, 1]), load_cluster(old), "new"), tmp_path)
    assert (cluster.name, [h.name for h in cluster.hosts]) == ("old", ["x", "y"])
    assert [(h.device, h.fabric, h.nics) for h in cluster.hosts] == [
        ("T4", "f", (Nic(kind="roce", gbit=16.0),)),
        ("T4", "f", (Nic(kind="roce", gbit=8.0),)),
    ]
    # all hosts on one fabric: what was measured is RDMA
    assert cluster_links(cluster)((0, 1)) == pytest.approx(1e9)


def test_a_host_of_two_kinds_and_ranks_out_of_order_are_refused() -> None:
    findings = found(((0, 1),), [1.0], [1, 1])
    first, second = findings.facts
    with pytest.raises(UserError, match="devices of 2 kinds"):
        assemble(replace(findings, facts=(first, replace(second, device="other"))), None, "lab")
    assert group_hosts(["0", "0", "1"]) == ((0, 1), (2,))
    with pytest.raises(UserError, match="not in a row"):
        group_hosts(["0", "1", "0"])


SPEC = ModelSpec(name="m", layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=61)
COSTS = """
seconds_per_token2 = 1e-8
seconds_per_token = 1e-5
seconds_per_pass = 1e-3
bytes_per_token = 100.0
tokens_per_device = 5000
[measured.bytes_per_second]
2 = 1e8
[measured.model]
name = "m"
parameters = {parameters}
layers = 3
heads = 4
kv_heads = 2
head_dim = 8
[[measured.methods]]
name = "ulysses"
bytes_per_token = 200.0
scaling = "fraction"
heads = 4
"""


def test_measured_costs_are_for_one_model_and_survive_the_file(tmp_path: Path) -> None:
    base = assemble(found(((0,), (1,)), [1.25e8, 2.5e7], [1, 0.5]), None, "lab")
    path = tmp_path / "full.toml"
    path.write_text(cluster_toml(base) + COSTS.format(parameters=SPEC.parameters()))
    cluster = load_cluster(path)
    costs = measured_costs(cluster, SPEC)
    assert costs is not None
    assert (costs.speeds, costs.seconds_per_token) == ((1, 0.5), 1e-5)
    assert costs.method("ulysses") is not None
    assert costs.rate((0, 1)) == pytest.approx(2.5e7)
    draw = random.Random(0)
    step = plan_step([draw.randint(1, 900) for _ in range(12)], costs, time_limit=0.1)
    assert step.seconds > 0
    assert measured_costs(cluster, replace(SPEC, layers=4)) is None
    assert loaded(cluster, tmp_path) == cluster


def test_a_file_without_measurements_is_written_back(tmp_path: Path) -> None:
    hosts = (Host(name="a", device="cpu", count=2),)
    cluster = Cluster(name='odd "name"', hosts=hosts, devices={"cpu": CATALOG["cpu"]})
    assert loaded(cluster, tmp_path) == cluster
    assert "[devices" not in cluster_toml(cluster)


@pytest.mark.parametrize("gated", [True, False])
def test_the_decoder_has_the_shapes_parameters(gated: bool) -> None:
    spec = replace(SPEC, gated_mlp=gated)
    model = Decoder(spec)
    assert sum(p.numel() for p in model.parameters()) == spec.parameters()
    logits = model(torch.arange(10)[None], torch.arange(10)[None])
    assert logits.shape == (1, 10, 61)
    assert torch.isfinite(logits).all()


def test_costs_of_few_layers_give_those_of_many(tmp_path: Path) -> None:
    base = assemble(found(((0,), (1,)), [1.25e8, 2.5e7], [1, 0.5]), None, "lab")
    path = tmp_path / "full.toml"
    path.write_text(cluster_toml(base) + COSTS.format(parameters=SPEC.parameters()))
    costs = measured_costs(load_cluster(path))
    assert costs is not None
    many = extrapolate(replace(costs, seconds_per_token=4e-6), costs, 1, 3, 11)
    assert many.seconds_per_token == pytest.approx(4e-6 + 5 * 6e-6)
    assert many.seconds_per_token2 == costs.seconds_per_token2
    assert many.methods[0].bytes_per_token == pytest.approx(200 * 11 / 3)
