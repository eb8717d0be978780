"""Which of the job's ranks the processes of a host are, and by which NICs they are reached."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.reduction.nics import nic_rates
from heteromesh.runtime.launch.agent import say
from heteromesh.runtime.network.nics import own_nics


def host_index(cluster: Cluster | None, node_rank: int | None, *, one_host: bool) -> int | None:
    """Returns which host of the job this one is, from 0: as --node-rank says, else by its name in the cluster file.

    None where neither tells. Raises UserError for a host that the file does not have.
    """
    if one_host:
        return 0
    names = [host.name for host in cluster.hosts] if cluster is not None else []
    if node_rank is not None:
        if cluster is not None and not 0 <= node_rank < len(names):
            raise UserError(
                f"--node-rank {node_rank} is no host of the cluster file, which has {len(names)}: give 0 for its first "
                "host, or describe this one in it"
            )
        return node_rank
    own = socket.gethostname()
    return names.index(own) if own in names else None


def first_place(cluster: Cluster | None, host: int | None, processes: int) -> int | None:
    """Returns which rank of the job the first process of the host is, where that is known.

    Raises UserError for more processes than the cluster file has devices there.
    """
    if host is None or cluster is None:
        return None if host is None else host * processes
    first = cluster.rank_hosts.index(host)
    there, name = cluster.hosts[host].count, cluster.hosts[host].name
    # a whole job on one machine, of a file that describes several, is no mistake: all ranks are there
    if processes > there and processes != cluster.ranks:
        raise UserError(
            f"--nproc-per-node {processes} is more than the {there} devices of host {name!r} in the cluster file: "
            "start one process a device, or describe the devices that run"
        )
    return first


def nic_addresses(cluster: Cluster | None, host: int | None, found: Sequence[str]) -> Sequence[str]:
    """Returns an address of each of the host's NICs where the cluster file describes several, else those `found`.

    Raises UserError where HETEROMESH_NICS names NICs that are not there.
    """
    if cluster is None or host is None:
        return found
    count = len(nic_rates(cluster)[host])
    if count < 2:
        return found
    nics = own_nics(cluster.hosts[host].name, count)
    if not nics.problem:
        return nics.addresses
    if nics.named:
        raise UserError(nics.problem)
    say(f"one NIC of this host is used: {nics.problem}")
    return found
