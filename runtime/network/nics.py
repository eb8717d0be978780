"""Gradient sums over all NICs of the hosts: which NICs this host has, whether all can be used, the transport.

The cluster file says how many Ethernet NICs a host has and how fast they are, not what they are called: a host's
HETEROMESH_NICS names them (interfaces or IPv4 addresses, in the file's order); without it the host's interfaces are
taken where there are as many as described. What was named and can't be used is refused; what was merely found is not.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heteromesh.comm.collectives.uneven import UnevenCollectives
from heteromesh.comm.nics.connect import open_nics
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.reduction.nics import Split, all_nics_pay, nic_rates, over_all_nics, split
from heteromesh.planner.reduction.reduction import Reduction
from heteromesh.runtime.network.interfaces import Interface, interfaces
from heteromesh.runtime.network.routes import leaves_by

NICS_VARIABLE = "HETEROMESH_NICS"
CONNECT_SECONDS = 20.0
_NOT_ETHERNET = ("ib", "roce")
"""What interfaces of other kinds are called, on Linux and in the sandbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNics:
    """The Ethernet NICs of one host, in the cluster file's order, or why they can't be told."""

    interfaces: tuple[Interface, ...] = ()
    """An address that is no interface's first one has an empty name."""
    named: bool = False
    """By the user."""
    problem: str = ""

    @property
    def addresses(self) -> list[str]:
        return [interface.address for interface in self.interfaces]


def open_nic_collectives(
    world: World, cluster: Cluster, limits: Sequence[float] | None, silence_seconds: float
) -> UnevenCollectives | None:
    """Opens sums over all NICs; returns None where one NIC of each host is as good, or others can't be used.

    The latter is told in one sentence on standard error. Every rank of the world, on CPUs, must call it.

    Args:
        limits: per rank, the largest fraction of a tensor it has memory for; None: no limits.
        silence_seconds: how long a peer's kernel may be silent before the transport ends.

    Raises UserError, on every rank, where HETEROMESH_NICS names NICs that can't be used.
    """
    planned = world.once(lambda: _plan(cluster, limits))
    if planned is None:
        return None
    reduction, ways = planned
    hosts, counts = reduction.hosts, [len(rates) for rates in nic_rates(cluster)]
    mine = own_nics(cluster.host_of(world.rank).name, counts[hosts[world.rank]])
    told = world.gather(mine)
    problem = _first(nics.problem for nics in told) or _one_machine(cluster, told)
    problem = problem or _first(world.gather(_too_many(world, counts) or _wrong_way(cluster, world.rank, told)))
    transport = None
    if not problem:
        transport, problem = _open(world, mine.addresses, hosts, counts, ways, silence_seconds)
    if transport is not None:
        return UnevenCollectives(transport, reduction)
    if any(nics.named for nics in told):
        raise UserError(problem)
    if world.rank == 0:
        print(f"heteromesh: gradients are summed over one NIC of each host: {problem}", file=sys.stderr, flush=True)
    return None


def own_nics(host: str, count: int) -> HostNics:
    """Returns this host's NICs: those that HETEROMESH_NICS names, else all that there are.

    Args:
        host: its name in the cluster file.
        count: how many Ethernet NICs the file describes for it.
    """
    there, named = interfaces(), os.environ.get(NICS_VARIABLE, "")
    if not named:
        found = tuple(i for i in there if not i.name.startswith(_NOT_ETHERNET))
        return HostNics(interfaces=found, problem="" if len(found) == count else _not_so_many(host, count, found))
    words = [word.strip() for word in named.split(",")]
    chosen = [next((i for i in there if word in (i.name, i.address)), None) or _by_address(word) for word in words]
    missing = [word for word, interface in zip(words, chosen, strict=True) if interface is None]
    if missing:
        known = ", ".join(i.name for i in there) or "none"
        problem = (
            f"{NICS_VARIABLE} on host {host!r} names {', '.join(map(repr, missing))}, which is no interface there that "
            f"is up with an IPv4 address (those are: {known}): name the NICs that the cluster file describes"
        )
        return HostNics(named=True, problem=problem)
    if len(words) != count or len(set(words)) != count:
        problem = (
            f"{NICS_VARIABLE} on host {host!r} is {named!r} and the cluster file describes {count} Ethernet "
            f"NIC{'s' * (count != 1)} there: name each once, in the file's order, or describe others"
        )
        return HostNics(named=True, problem=problem)
    return HostNics(named=True, interfaces=tuple(i for i in chosen if i))


def _plan(cluster: Cluster, limits: Sequence[float] | None) -> tuple[Reduction, Split] | None:
    if not all_nics_pay(cluster, max_fraction=limits):
        return None
    reduction = over_all_nics(cluster, max_fraction=limits)
    return reduction, split(reduction, nic_rates(cluster))


def _by_address(word: str) -> Interface | None:
    """Returns an address of this host's own that is not an interface's first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        try:
            tried.bind((socket.inet_ntoa(socket.inet_pton(socket.AF_INET, word)), 0))
        except OSError:
            return None
    return Interface(name="", address=word, prefix=32, mbit=None)


def _not_so_many(host: str, count: int, found: Sequence[Interface]) -> str:
    names, were = ", ".join(i.name for i in found) or "none", "was" if len(found) < 2 else "were"
    return (
        f"the cluster file describes {count} Ethernet NIC{'s' * (count != 1)} for host {host!r} and {names} {were} "
        f"found there: set {NICS_VARIABLE} on it to the NICs' names, as in eth0,eth1"
    )


def _first(problems: Iterable[str]) -> str:
    return next(filter(None, problems), "")


def _one_machine(cluster: Cluster, told: Sequence[HostNics]) -> str:
    """Returns what is wrong where two hosts of the file are one machine."""
    owner: dict[str, str] = {}
    for rank, nics in enumerate(told):
        host = cluster.host_of(rank).name
        for address in nics.addresses:
            other = owner.setdefault(address, host)
            if other != host:
                return f"hosts {other!r} and {host!r} both have the address {address}: describe one machine as one host"
    return ""


def _too_many(world: World, counts: Sequence[int]) -> str:
    needed = max(counts) ** 2 * (world.size - 1)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = len(os.listdir("/proc/self/fd"))
    if 2 * needed + used < limit:  # twice: while connecting there are handshakes too
        return ""
    return f"rank {world.rank} may open {limit} files and all NICs take {needed} connections: raise ulimit -n"


def _wrong_way(cluster: Cluster, rank: int, told: Sequence[HostNics]) -> str:
    """Returns what is wrong where packets from a NIC of this host to one of another's would leave by another NIC."""
    host = cluster.host_of(rank).name
    targets = {a: cluster.host_of(r).name for r, nics in enumerate(told) for a in nics.addresses}
    for nic in told[rank].interfaces:
        for target, there in targets.items():
            if there == host or not nic.name:
                continue
            problem = _astray(nic, target)
            if problem:
                return (
                    f"on host {host!r} packets from {nic.name} ({nic.address}) to {target} of host {there!r} "
                    f"{problem}: give each NIC's address a routing rule (ip rule add from ADDRESS table N), by which "
                    "it reaches every NIC of the other hosts"
                )
    return ""


def _astray(nic: Interface, target: str) -> str:
    try:
        interface = leaves_by(nic.address, target)
    except OSError as error:
        return f"find no way ({error.strerror or error})"
    return "" if interface == nic.name else f"leave by {interface}"


def _open(
    world: World, addresses: Sequence[str], hosts: Sequence[int], counts: Sequence[int], ways: Split, seconds: float
) -> tuple[TcpTransport | None, str]:
    """Returns the transport, or why there is none; one of the two on every rank alike."""
    assert world.gradients
    transport, problem = None, ""
    try:
        transport = open_nics(
            world.gradients, addresses, hosts, counts, ways, seconds=seconds, connect_seconds=CONNECT_SECONDS
        )
    except (UserError, GroupAborted) as error:
        problem = str(error)
    problem = _first(world.gather(problem))
    if problem and transport is not None:
        transport.close()
        transport = None
    return transport, problem
