"""What machines there are: hosts, their devices and NICs, and which hosts share a fabric.

Format of the file: docs/cluster-file.md. Ranks are numbered host by host, in file order.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from heteromesh.errors import UserError
from heteromesh.planner import files
from heteromesh.planner.cluster.catalog import CATALOG, Device
from heteromesh.planner.model.constants import Constants, constants_from_table
from heteromesh.planner.model.method import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """Equal NICs of a host."""

    kind: Literal["infiniband", "roce", "ethernet"]
    gbit: float
    """Gbit/s each way, of one NIC."""
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine with equal devices."""

    name: str
    device: str
    count: int
    """Devices, one rank each."""
    fabric: str = ""
    """Hosts on one fabric can use RDMA with each other; empty: on none."""
    nics: tuple[Nic, ...] = ()
    memory_gb: float | None = None
    """The host's own memory, that training may use; None: not known, then nothing is planned to wait there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """The shape of the model that `[measured]` constants are for."""

    name: str
    parameters: int
    layers: int
    """Calls of attention in a forward pass."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Literal["bf16", "fp32"] = "fp32"
    """That it computed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `probe` or a run found, preferred to catalogue values."""

    speeds: tuple[float, ...] = ()
    """Per rank, relative to the reference device; empty: not measured."""
    latency_seconds: float | None = None
    """The time of the smallest message between hosts (of one host: between its ranks), one way."""
    nic_gbit: tuple[tuple[float, float], ...] = ()
    """Per host, Gbit/s to others and from others by all NICs that exchanges use."""
    link_gbps: tuple[float, ...] = ()
    """Per host, GB/s each way from one device to another."""
    model: MeasuredModel | None = None
    methods: tuple[Method, ...] = ()
    """Ways to split that were measured, instead of the one that the constants name."""
    constants: Constants | None = None

    def subset(self, ranks: Sequence[int], hosts: Sequence[int]) -> Measured:
        """Returns what was found of these ranks and hosts."""
        return replace(
            self,
            speeds=tuple(self.speeds[r] for r in ranks if self.speeds),
            nic_gbit=tuple(self.nic_gbit[h] for h in hosts if self.nic_gbit),
            link_gbps=tuple(self.link_gbps[h] for h in hosts if self.link_gbps),
        )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts in file order, and the devices they name."""

    name: str
    hosts: tuple[Host, ...]
    devices: Mapping[str, Device]
    measured: Measured = field(default_factory=Measured)
    subset_of: Cluster | None = None
    """The cluster that this is a part of: speeds and measurements stay relative to its devices."""

    @cached_property
    def rank_hosts(self) -> tuple[int, ...]:
        """Per rank, the index of its host."""
        return tuple(i for i, host in enumerate(self.hosts) for _ in range(host.count))

    @property
    def ranks(self) -> int:
        return len(self.rank_hosts)

    def host_of(self, rank: int) -> Host:
        """Returns the host of a rank."""
        return self.hosts[self.rank_hosts[rank]]

    def device_name(self, rank: int) -> str:
        """Returns the device's name as the file has it."""
        return self.host_of(rank).device

    def device_of(self, rank: int) -> Device:
        """Returns the device of a rank."""
        return self.devices[self.device_name(rank)]

    @property
    def whole(self) -> Cluster:
        """The cluster of the file: this one, or the one that it is a part of."""
        return self.subset_of or self

    @cached_property
    def fastest_device(self) -> Device:
        """The whole cluster's device of most TFLOP/s, which speeds are relative to."""
        return max((self.whole.devices[host.device] for host in self.whole.hosts), key=lambda device: device.tflops)

    def speeds(self) -> tuple[float, ...]:
        """Returns by rank what was measured, else peak TFLOP/s relative to the fastest device."""
        if self.measured.speeds:
            return self.measured.speeds
        return tuple(self.device_of(rank).tflops / self.fastest_device.tflops for rank in range(self.ranks))

    def subset(self, ranks: Collection[int]) -> Cluster:
        """Returns the cluster of some ranks, numbered anew in the same order, with what was measured of them.

        A host that loses devices keeps its NICs; one that loses all is gone. Costs and rates of the ranks that stay
        are what they were in the whole. Raises ValueError for no ranks, repeated ones and ones that there are not.
        """
        left = sorted(set(ranks))
        if not left or len(left) != len(ranks) or not 0 <= left[0] <= left[-1] < self.ranks:
            raise ValueError(f"the ranks {list(ranks)} are no subset of {self.ranks} ranks: name some, each once")
        counts = Counter(self.rank_hosts[rank] for rank in left)
        hosts = tuple(replace(self.hosts[index], count=count) for index, count in counts.items())
        return Cluster(
            name=self.name,
            hosts=hosts,
            devices={host.device: self.devices[host.device] for host in hosts},
            measured=self.measured.subset(left, list(counts)),
            subset_of=self.whole,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of hosts and devices; the name and measured values don't count."""
        # what was not said before a file could say it doesn't count
        told = [{k: v for k, v in asdict(host).items() if k != "memory_gb" or v is not None} for host in self.hosts]
        content = {
            "hosts": told,
            "devices": {name: asdict(self.devices[name]) for name in sorted(self.devices)},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def local_cluster(ranks: int) -> Cluster:
    """Returns one host with this many processes on its CPU: what a run without a cluster file is planned for."""
    if ranks < 1:
        raise UserError(f"a cluster of {ranks} ranks can't run anything: give at least 1")
    host = Host(name="localhost", device="cpu", count=ranks)
    return Cluster(name="local", hosts=(host,), devices={"cpu": CATALOG["cpu"]})


def load_cluster(path: Path) -> Cluster:
    """Reads a cluster file; raises UserError naming the file and what is wrong in it."""
    where = f"cluster file {path}"
    table = files.build(_File, files.read_toml(path, "cluster file"), where)
    hosts = tuple(host for i, group in enumerate(table.hosts) for host in _expand(group, f"{where}: hosts[{i}]"))
    if not hosts:
        raise UserError(f"{where} has no [[hosts]]: describe at least one host")
    names = [host.name for host in hosts]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{where} names the host {repeated!r} twice: give every host a name of its own")
    devices = {host.device: _device(host.device, table.devices, where) for host in hosts}
    _check_network(hosts, where)
    ranks = sum(host.count for host in hosts)
    measured = _measured(table.measured, len(hosts), ranks, f"{where}: [measured]")
    return Cluster(name=table.name or path.stem, hosts=hosts, devices=devices, measured=measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A [[hosts]] table: equal hosts."""

    names: tuple[str, ...]
    device: str
    count: int
    fabric: str = ""
    nics: tuple[Nic, ...] = ()
    memory_gb: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    hosts: tuple[_Group, ...]
    name: str = ""
    devices: dict[str, Device] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


def _expand(group: _Group, where: str) -> list[Host]:
    if not group.names or "" in group.names:
        raise UserError(f"{where}: names is {list(group.names)}: give at least one name, none of them empty")
    rest = {name: getattr(group, name) for name in ("device", "count", "fabric", "nics", "memory_gb")}
    return [Host(name=name, **rest) for name in group.names]


def _device(name: str, own: Mapping[str, Device], where: str) -> Device:
    device = own.get(name) or CATALOG.get(name)
    if device is None:
        known = ", ".join([*own, *(n for n in CATALOG if n not in own)])
        raise UserError(
            f"{where} has the device {name!r}, which is not built in: describe it under [devices.{name}] or use {known}"
        )
    return device


def _check_network(hosts: tuple[Host, ...], where: str) -> None:
    """Checks that every two hosts have a way to talk: RDMA or Ethernet inside a fabric, Ethernet between fabrics."""
    if len(hosts) == 1:
        return
    for host in hosts:
        if not host.nics:
            raise UserError(f"{where}: host {host.name!r} has no nics and there are {len(hosts)} hosts: add nics to it")
    kinds = {host.name: {nic.kind for nic in host.nics} for host in hosts}
    for host in hosts:
        mates = [m for m in hosts if m.fabric == host.fabric and host.fabric]
        rdma = set().union(*(kinds[m.name] for m in mates)) - {"ethernet"}
        if len(rdma) > 1:
            raise UserError(
                f"{where}: fabric {host.fabric!r} mixes infiniband and roce, which can't use RDMA with each other: "
                "give the hosts of each kind a fabric of their own"
            )
        if len(mates) < len(hosts) and "ethernet" not in kinds[host.name]:
            raise UserError(
                f"{where}: host {host.name!r} has no ethernet nic and other hosts are not on its fabric "
                f"{host.fabric!r}: add an ethernet nic or put them on one fabric"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredTable:
    """[measured] without the keys of a cost file."""

    speeds: tuple[float, ...] = ()
    latency_seconds: float | None = None
    nic_gbit: tuple[tuple[float, ...], ...] = ()
    link_gbps: tuple[float, ...] = ()
    model: MeasuredModel | None = None
    methods: tuple[dict[str, Any], ...] = ()


def _measured(table: Mapping[str, Any], hosts: int, ranks: int, where: str) -> Measured:
    of_costs, own = ([f.name for f in fields(kind)] for kind in (Constants, _MeasuredTable))
    for key in table:
        if key not in (*own, *of_costs):
            raise files.unknown_key(key, [*own, *of_costs], where)
    raw = files.build(_MeasuredTable, {k: v for k, v in table.items() if k in own}, where)
    costs = {key: value for key, value in table.items() if key not in own}
    for name, values, wanted, what in (
        ("speeds", raw.speeds, ranks, "rank"),
        ("nic_gbit", raw.nic_gbit, hosts, "host"),
        ("link_gbps", raw.link_gbps, hosts, "host"),
    ):
        if values and len(values) != wanted:
            raise UserError(
                f"{where}: {name} has {len(values)} entries and the cluster has {wanted} {what}s: give one a {what}"
            )
    for i, pair in enumerate(raw.nic_gbit):
        if len(pair) != 2:
            raise UserError(f"{where}: nic_gbit[{i}] has {len(pair)} numbers: give two, out of the host and into it")
    if (raw.model or raw.methods) and not costs:
        raise UserError(f"{where} has a model or methods and no costs: give seconds_per_token and the other constants")
    return Measured(
        speeds=raw.speeds,
        latency_seconds=raw.latency_seconds,
        nic_gbit=tuple((out, into) for out, into in raw.nic_gbit),
        link_gbps=raw.link_gbps,
        model=raw.model,
        methods=tuple(_method(m, f"{where}: methods[{i}]") for i, m in enumerate(raw.methods)),
        constants=constants_from_table(costs, where) if costs else None,
    )


def _method(table: Mapping[str, Any], where: str) -> Method:
    # "no heads" and "no bytes" are written as 0, which the strict reader takes for a mistake
    names = {f.name for f in fields(Method)}
    zeros: dict[str, Any] = {k: v for k, v in table.items() if k in names and isinstance(v, (int, float)) and v == 0}
    needed = {"bytes_per_token": 1.0} if "bytes_per_token" in zeros else {}
    rest = {k: v for k, v in table.items() if k not in zeros}
    return replace(files.build(Method, rest | needed, where), **zeros)
