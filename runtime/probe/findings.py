"""Everything that a probe found, equal on every rank, and what of it is out of line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.runtime.network.measure import Network, measure_network
from heteromesh.runtime.network.sockets import CardRate, measure_cards
from heteromesh.runtime.probe.devices.compute import Compute, measure_compute
from heteromesh.runtime.probe.devices.facts import Facts, collect_facts
from heteromesh.runtime.probe.outliers import Reading, outliers


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Facts and measurements of all ranks."""

    facts: tuple[Facts, ...]
    compute: tuple[Compute, ...]
    network: Network
    cards: tuple[CardRate, ...]
    """Where some host has several network cards."""
    names: tuple[str, ...]
    """Per host."""
    kinds: tuple[str, ...]
    """Per rank, the name of its device: the old file's, else the maker's."""
    nominal_gbit: tuple[float | None, ...]
    """Per host, what its network cards are said to carry; None: nothing is."""

    def host_of(self, rank: int) -> int:
        """Returns the host of a rank."""
        return next(i for i, ranks in enumerate(self.network.hosts) if rank in ranks)

    @property
    def latency(self) -> float | None:
        """Seconds of a small message between hosts (of one host: between its ranks), the median pair's."""
        pairs = [p.latency for p in self.network.between] or [p.latency for p in self.network.local]
        return statistics.median(pairs) if pairs else None

    def link(self, host: int) -> float:
        """Bytes per second each way between two ranks of a host, the median pair's; 0: it has one rank."""
        ranks = self.network.hosts[host]
        pairs = [p.both for p in self.network.local if p.ranks[0] in ranks]
        return statistics.median(pairs) if pairs else 0.0


def collect(world: World, described: Cluster | None) -> Findings:
    """Measures. described: names and nominal rates of the hosts, where a file has them.

    Raises UserError where the file is for another job.
    """
    facts = tuple(world.gather(collect_facts(world)))
    hosts = group_hosts([f.host for f in facts])
    names = host_names([facts[ranks[0]].hostname for ranks in hosts])
    if described:
        check_described(described, hosts)
        names = tuple(host.name for host in described.hosts)
    compute = measure_compute(world)
    # clocks and limits are asked for straight after the load
    facts = tuple(world.gather(collect_facts(world)))
    network = measure_network(world, hosts)
    cards = [facts[ranks[0]].interfaces for ranks in hosts]
    several = len(hosts) > 1 and max(map(len, cards)) > 1
    return Findings(
        facts=facts,
        compute=tuple(world.gather(compute)),
        network=network,
        cards=tuple(measure_cards(world, hosts, cards)) if several else (),
        names=names,
        kinds=tuple(described.device_name(r) if described else f.device for r, f in enumerate(facts)),
        nominal_gbit=tuple(_nominal(described, facts, h, ranks[0]) for h, ranks in enumerate(hosts)),
    )


def _nominal(described: Cluster | None, facts: Sequence[Facts], host: int, leader: int) -> float | None:
    if described and described.hosts[host].nics:
        return sum(nic.gbit * nic.count for nic in described.hosts[host].nics)
    known = [i.mbit / 1e3 for i in facts[leader].interfaces if i.mbit]
    return max(known) if known else None


def group_hosts(hosts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Ranks by host, in rank order; raises UserError where a host's ranks are not numbered in a row."""
    groups: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        groups.setdefault(host, []).append(rank)
    for ranks in groups.values():
        if ranks != list(range(ranks[0], ranks[0] + len(ranks))):
            raise UserError(
                f"the ranks {ranks} of a host are not in a row, as a cluster file has them: "
                "start probe with torchrun's flags, which number ranks host by host"
            )
    return tuple(map(tuple, groups.values()))


def host_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names made different from each other where machines share one."""
    return tuple(name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names))


def check_described(described: Cluster, hosts: Sequence[Sequence[int]]) -> None:
    """Raises UserError where the file has other hosts than the job."""
    wanted, found = [host.count for host in described.hosts], [len(ranks) for ranks in hosts]
    if wanted != found:
        raise UserError(
            f"the cluster file {described.name} has hosts with {wanted} devices and the job has {found} ranks on its "
            "hosts: start one process per device of the file, or leave --cluster out"
        )


def find_outliers(findings: Findings) -> tuple[str, ...]:
    """Says in one sentence each: ranks, links and cards slower than their kind, and devices that are held back."""
    held = [
        f"rank {rank} on {findings.names[findings.host_of(rank)]} is held back by {' and '.join(f.nvidia.held_back_by)}"
        for rank, f in enumerate(findings.facts)
        if f.nvidia and f.nvidia.held_back_by
    ]
    return (*outliers([*_rank_readings(findings), *_link_readings(findings)]), *held)


def _rank_readings(findings: Findings) -> list[Reading]:
    found = []
    for rank, compute in enumerate(findings.compute):
        subject = f"rank {rank} on {findings.names[findings.host_of(rank)]}"
        for verb, value, unit in (
            ("multiplies matrices at", compute.best_tflops, "TFLOP/s"),
            ("copies memory at", compute.memory_gbps, "GB/s"),
        ):
            found.append(Reading(subject=subject, verb=verb, kind=findings.kinds[rank], value=value, unit=unit))
    return found


def _link_readings(findings: Findings) -> list[Reading]:
    network, names = findings.network, findings.names
    found = [
        Reading(
            subject=f"the link of ranks {p.ranks[0]} and {p.ranks[1]} on {names[findings.host_of(p.ranks[0])]}",
            verb="carries",
            kind=f"links inside hosts of {findings.kinds[p.ranks[0]]}",
            value=p.both / 1e9,
            unit="GB/s",
        )
        for p in network.local
    ]
    cards = [f"{n:g} Gbit/s cards" if n else "cards of unknown rate" for n in findings.nominal_gbit]
    for host, (out, into) in enumerate(zip(network.out, network.into, strict=True)):
        for verb, value in (("sends", out), ("receives", into)):
            kind = f"hosts with {cards[host]}"
            found.append(Reading(subject=names[host], verb=verb, kind=kind, value=value * 8e-9, unit="Gbit/s"))
    for p in network.between:
        kinds = sorted({cards[h] for h in p.hosts})
        found.append(
            Reading(
                subject=f"the link of {names[p.hosts[0]]} and {names[p.hosts[1]]}",
                verb="carries",
                kind=f"links between hosts with {' and '.join(kinds)}",
                value=p.both * 8e-9,
                unit="Gbit/s",
            )
        )
    return found
