"""Hosts counted by kind: those that are equal, or, where that would be too many kinds, similar in speed.

A kind stands for the best of its hosts in everything, so that a bound for kinds is a bound for hosts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from heteromesh.planner.stages.hosts import ClusterResources, HostResources


@dataclass(frozen=True, slots=True, kw_only=True)
class HostClass:
    """Hosts on one fabric with the same number of devices."""

    best: HostResources
    """At least as good as each of the hosts."""
    hosts: tuple[HostResources, ...]
    """The fastest first."""


def host_classes(resources: ClusterResources, tolerance: float) -> list[HostClass]:
    """Returns kinds whose hosts' speeds differ by no more than this (relative); 0: only equal hosts together."""

    def place(host: HostResources) -> tuple[float, ...]:
        fabric = resources.domains.index(host.fabric)
        return (fabric, -len(host.speeds), -sum(host.speeds), host.memory, host.rdma, host.ethernet)

    groups: list[list[HostResources]] = []
    for host in sorted(resources.hosts, key=place):
        mates = groups[-1] if groups else []
        if mates and _alike(mates[0], host, tolerance):
            mates.append(host)
        else:
            groups.append([host])
    return [HostClass(best=_best(group), hosts=tuple(group)) for group in groups]


def _alike(a: HostResources, b: HostResources, tolerance: float) -> bool:
    if a.host_class == b.host_class:
        return True
    if not tolerance or (a.fabric, len(a.speeds)) != (b.fabric, len(b.speeds)):
        return False
    return math.isinf(tolerance) or sum(a.speeds) <= (1 + tolerance) * sum(b.speeds)


def _best(hosts: list[HostResources]) -> HostResources:
    return HostResources(
        ranks=(),
        speeds=tuple(map(max, zip(*(h.speeds for h in hosts), strict=True))),
        memory=max(h.memory for h in hosts),
        memory_rate=max(h.memory_rate for h in hosts),
        link=max(h.link for h in hosts),
        fabric=hosts[0].fabric,
        rdma=max(h.rdma for h in hosts),
        ethernet=max(h.ethernet for h in hosts),
    )
