"""Groups of ranks by fabric: RDMA inside one, sockets wherever a group spans several.

RDMA does not leave a fabric, and NCCL can't use both networks in one communicator (NVIDIA/nccl#878); a communicator
that mixes them hangs at its first use. So a group uses RDMA only where one fabric reaches all of its hosts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import one_fabric
from heteromesh.planner.stages.stages import Placement

Network = Literal["rdma", "socket"]
WORLD = "world"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """A fixed set of ranks with one communicator."""

    name: str
    ranks: tuple[int, ...]
    network: Network


def network_of(cluster: Cluster, ranks: Iterable[int]) -> Network:
    """Returns RDMA where every rank's host has a NIC for it on the same fabric; a set inside one such host too."""
    hosts = {cluster.rank_hosts[r] for r in ranks}
    nics = all(any(nic.kind != "ethernet" for nic in cluster.hosts[h].nics) for h in hosts)
    return "rdma" if nics and one_fabric(cluster.hosts[h].fabric for h in hosts) else "socket"


def groups(cluster: Cluster, placement: Placement | None = None) -> tuple[RankGroup, ...]:
    """Returns world, hosts and fabrics of several ranks; with a placement its pipelines, replicas and gradient sums
    too.

    A gradient sum over several fabrics has, besides its own group, one inside each fabric, which sums first, and one
    for every set of ranks that hold the same share of that sum: rank i of each fabric, where all have as many.
    """
    found: list[tuple[str, tuple[int, ...]]] = [(WORLD, tuple(range(cluster.ranks)))]
    for index, host in enumerate(cluster.hosts):
        found.append((f"host {host.name}", tuple(r for r, h in enumerate(cluster.rank_hosts) if h == index)))
    for fabric, ranks in _by_fabric(cluster, range(cluster.ranks)).items():
        found.append((f"fabric {fabric}", ranks))
    if placement is not None:
        for j, pipeline in enumerate(placement.pipelines):
            found.append((f"pipeline {j}", tuple(r for replica in pipeline for r in replica)))
        for s, stage in enumerate(placement.stages):
            found += [(f"stage {s} replica {j}", replica) for j, replica in enumerate(stage.replicas)]
            for place, ranks in enumerate(stage.data_parallel_groups):
                found += _sums(cluster, f"stage {s} sum {place}", ranks)
    made = tuple(
        RankGroup(name=name, ranks=ranks, network=network_of(cluster, ranks)) for name, ranks in found if len(ranks) > 1
    )
    check_groups(cluster, made)
    return made


def check_groups(cluster: Cluster, made: Sequence[RankGroup]) -> None:
    """Asserts that no group that uses RDMA spans fabrics."""
    for group in made:
        fabrics = {cluster.host_of(rank).fabric for rank in group.ranks}
        assert group.network == "socket" or one_fabric(fabrics), (
            f"group {group.name} would use RDMA across the fabrics {sorted(fabrics)}"
        )


def _sums(cluster: Cluster, name: str, ranks: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    inside = _by_fabric(cluster, ranks)
    listed = [(name, ranks)]
    if len(inside) > 1:
        listed += [(f"{name} in {fabric}", members) for fabric, members in inside.items()]
        if len({len(members) for members in inside.values()}) == 1:
            listed += [(f"{name} across {i}", peers) for i, peers in enumerate(zip(*inside.values(), strict=True))]
    return listed


def _by_fabric(cluster: Cluster, ranks: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """Returns ranks by fabric; those on none by their host."""
    found: dict[str, list[int]] = {}
    for rank in ranks:
        host = cluster.host_of(rank)
        found.setdefault(host.fabric or f"none ({host.name})", []).append(rank)
    return {fabric: tuple(members) for fabric, members in found.items()}
