"""A cluster description from what was found, with the old file's names, fabrics and kinds where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG, Device
from heteromesh.planner.cluster.cluster import Cluster, Host, Measured, Nic
from heteromesh.planner.model.constants import Constants
from heteromesh.runtime.probe.devices.device import catalogue_name, describe
from heteromesh.runtime.probe.findings import Findings
from heteromesh.runtime.probe.model.costs import ModelCosts


def assemble(findings: Findings, described: Cluster | None, name: str) -> Cluster:
    """Returns the cluster without model costs. described: the old file. name: of the cluster, where there is none."""
    devices = dict(described.devices) if described else {}
    hosts = []
    for index, ranks in enumerate(findings.network.hosts):
        old = described.hosts[index] if described else None
        device = old.device if old else _device(findings, ranks, devices)
        host = old or Host(name=findings.names[index], device=device, count=len(ranks))
        hosts.append(replace(host, nics=_nics(findings, index, old)))
    return Cluster(
        name=described.name if described else name,
        hosts=tuple(hosts),
        devices=devices,
        measured=Measured(
            speeds=_speeds(findings),
            latency_seconds=findings.latency,
            nic_gbit=_nic_gbit(findings),
            link_gbps=_links(findings),
        ),
    )


def with_costs(cluster: Cluster, found: ModelCosts) -> Cluster:
    """Returns the cluster with a model's constants in `[measured]`."""
    costs, size = found.costs, cluster.ranks
    memory = [cluster.device_of(rank).memory_gb for rank in range(size)]
    # what binding takes for every rank: its share of the largest memory
    tokens = min(int(c * max(memory) / m) for c, m in zip(costs.capacity, memory, strict=True))
    usable = [m for m in costs.methods if m.fits(size)]
    constants = Constants(
        **{f.name: getattr(costs, f.name) for f in fields(Constants) if f.name.startswith("seconds_")},
        bytes_per_token=usable[0].bytes_at(size) if usable and size > 1 else 0.0,
        tokens_per_device=tokens,
        bytes_per_second={size: costs.rate(range(size))} if size > 1 else {},
        method=usable[0].name if usable else "ulysses",
    )
    measured = replace(
        cluster.measured, speeds=costs.speeds, model=found.model, methods=costs.methods, constants=constants
    )
    return replace(cluster, measured=measured)


def _device(findings: Findings, ranks: Sequence[int], devices: dict[str, Device]) -> str:
    """Returns the name of a host's device; describes it in `devices` where the catalogue lacks it."""
    names = {findings.facts[r].device for r in ranks}
    if len(names) > 1:
        raise UserError(
            f"host {findings.names[findings.host_of(ranks[0])]} has devices of {len(names)} kinds "
            f"({', '.join(sorted(names))}), which a cluster file can't describe: hide the others with "
            "CUDA_VISIBLE_DEVICES, or start the kinds as two hosts"
        )
    maker = names.pop()
    known = catalogue_name(maker, findings.facts[ranks[0]].memory_bytes)
    if known:
        devices[known] = CATALOG[known]
        return known
    same = [r for r, f in enumerate(findings.facts) if f.device == maker]
    hosts = {findings.host_of(r) for r in same}
    links = [findings.link(h) for h in hosts if findings.link(h)]
    devices[maker] = describe(
        [findings.compute[r].best_tflops for r in same],
        [findings.facts[r].memory_bytes for r in same],
        [findings.compute[r].memory_gbps for r in same],
        min(links, default=0.0) / 1e9,
    )
    return maker


def _nics(findings: Findings, host: int, old: Host | None) -> tuple[Nic, ...]:
    """Cards with measured rates; those of an old file keep their kinds, and their rates where theirs is not known."""
    if len(findings.network.hosts) == 1:
        return old.nics if old else ()
    cards = [_two_digits(min(c.out, c.into) * 8e-9) for c in findings.cards if c.host == host and min(c.out, c.into)]
    whole = _two_digits(min(findings.network.out[host], findings.network.into[host]) * 8e-9)
    if old:
        ethernet = [nic for nic in old.nics if nic.kind == "ethernet"]
        if len(old.nics) == 1 and old.nics[0].count == 1:
            return (replace(old.nics[0], gbit=whole),)
        if len(ethernet) == len(old.nics) == len(cards) and all(nic.count == 1 for nic in old.nics):
            return tuple(replace(nic, gbit=rate) for nic, rate in zip(old.nics, cards, strict=True))
        return old.nics
    if len(cards) > 1:
        return tuple(Nic(kind="ethernet", gbit=rate) for rate in cards)
    return (Nic(kind="ethernet", gbit=whole),)


def _speeds(findings: Findings) -> tuple[float, ...]:
    fastest = max(c.best_tflops for c in findings.compute)
    return tuple(round(c.best_tflops / fastest, 3) or 0.001 for c in findings.compute)


def _links(findings: Findings) -> tuple[float, ...]:
    """Returns GB/s per host; one with one rank has the rate of a copy in its memory; none where no host has a link."""
    found = [findings.link(h) / 1e9 for h in range(len(findings.network.hosts))]
    if not any(found):
        return ()
    copies = [findings.compute[ranks[0]].memory_gbps / 2 for ranks in findings.network.hosts]
    return tuple(round(link or copy, 4) for link, copy in zip(found, copies, strict=True))


def _nic_gbit(findings: Findings) -> tuple[tuple[float, float], ...]:
    """Returns per host the Gbit/s out of it and into it."""
    ways = zip(findings.network.out, findings.network.into, strict=True)
    return tuple((float(f"{out * 8e-9:.4g}"), float(f"{into * 8e-9:.4g}")) for out, into in ways)


def _two_digits(value: float) -> float:
    """Rounds, so that hosts with equal cards stay one entry of the file."""
    return float(f"{value:.2g}")
