"""Hosts as the placement of stages sees them: devices, memory, and which network reaches whom.

Hosts that are equal in all of this are interchangeable, so they are counted by kind rather than named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import cluster_links, one_fabric
from heteromesh.planner.ownership.memory import USABLE
from heteromesh.planner.reduction.reduction import plan_reduction

LATENCY_SECONDS = 50e-6
"""Of handing a micro-batch to the next stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostResources:
    """One host."""

    ranks: tuple[int, ...]
    """World ranks, the fastest first."""
    speeds: tuple[float, ...]
    """The speeds of these ranks, relative to the reference device."""
    memory: float
    """Bytes of one device that can be used."""
    memory_rate: float
    """Bytes per second of a device's own memory."""
    link: float
    """Bytes per second each way of one device to the others of the host."""
    fabric: str
    """Empty: RDMA with no other host."""
    rdma: float
    """Bytes per second each way of the NICs that reach the hosts of its fabric."""
    ethernet: float
    """Bytes per second each way of the NICs that reach any host."""

    @property
    def host_class(self) -> HostResources:
        """What interchangeable hosts have in common."""
        return replace(self, ranks=())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterResources:
    """The hosts of a cluster, in its order."""

    hosts: tuple[HostResources, ...]
    uplink: float = math.inf
    """Bytes per second each way between two fabrics, all hosts together; infinite: only the hosts' NICs limit."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The fabrics in order of their first host. Hosts on none count as one domain: Ethernet is what they share."""
        return tuple(dict.fromkeys(host.fabric for host in self.hosts))


def cluster_resources(cluster: Cluster) -> ClusterResources:
    """Returns the hosts of a cluster with the rates and speeds that everything else is planned with."""
    links, speeds = cluster_links(cluster), cluster.speeds()
    resources, first = [], 0
    for index, host in enumerate(cluster.hosts):
        ranks = sorted(range(first, first + host.count), key=lambda r: (-speeds[r], r))
        first += host.count
        device = cluster.devices[host.device]
        alone = len(cluster.hosts) == 1
        resources.append(
            HostResources(
                ranks=tuple(ranks),
                speeds=tuple(speeds[r] for r in ranks),
                memory=device.memory_gb * 1e9 * USABLE,
                memory_rate=device.memory_gbps * 1e9,
                link=links.link[index],
                fabric=host.fabric,
                rdma=math.inf if alone else links.fabric_nics[index],
                ethernet=math.inf if alone else links.ethernet[index],
            )
        )
    return ClusterResources(hosts=tuple(resources))


def sum_seconds_per_byte(hosts: Sequence[HostResources], shards: int, uplink: float) -> float:
    """Returns the seconds a byte of summing a tensor over all devices of these hosts and handing it out (busiest link).

    Inside a host first, then over RDMA inside a fabric, and what is left (one share a host) across fabrics over
    Ethernet; or over Ethernet in one go where that is faster. `shards`: ranks that share a tensor's shards in a host
    (tensor parallel), each of which sums its own part.
    """
    inside = max((2 * (k - 1) / k / shards / h.link for h in hosts if (k := len(h.speeds) // shards) > 1), default=0.0)
    if len(hosts) == 1:
        return inside
    if one_fabric(host.fabric for host in hosts):
        return inside + _least([h.rdma for h in hosts])
    fabrics: dict[object, list[HostResources]] = {}
    for index, host in enumerate(hosts):
        fabrics.setdefault(host.fabric or index, []).append(host)
    if len(fabrics) == len(hosts):
        flat = _least([h.ethernet for h in hosts])
        return inside + max(flat, _shared(fabrics, uplink))
    within = max((_least([h.rdma for h in f]) for f in fabrics.values() if len(f) > 1), default=0.0)
    across = _least([sum(h.ethernet for h in f) for f in fabrics.values()])
    flat = _least([h.ethernet for h in hosts])
    return inside + max(_shared(fabrics, uplink), min(flat, within + across))


def _shared(fabrics: dict[object, list[HostResources]], uplink: float) -> float:
    """Returns the seconds a byte each way through the uplink of every fabric."""
    named = sum(1 for key in fabrics if isinstance(key, str)) + any(not isinstance(key, str) for key in fabrics)
    return 2 * (named - 1) / named / uplink


def _least(rates: Sequence[float]) -> float:
    """Returns the busiest link's seconds per byte under the best owners (planner.reduction)."""
    return plan_reduction(range(len(rates)), rates, rates).seconds_per_byte
