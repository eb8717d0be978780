"""Which network a set of ranks uses: RDMA inside one fabric, sockets wherever it spans several.

RDMA does not leave a fabric, and NCCL can't use both networks in one communicator (NVIDIA/nccl#878); a communicator
that mixes them hangs at its first use. So a set uses RDMA only where one fabric reaches all of its hosts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import one_fabric

Network = Literal["rdma", "socket"]


def network_of(cluster: Cluster, ranks: Iterable[int]) -> Network:
    """Returns RDMA where every rank's host has a NIC for it on the same fabric; a set inside one such host too."""
    hosts = {cluster.rank_hosts[r] for r in ranks}
    nics = all(any(nic.kind != "ethernet" for nic in cluster.hosts[h].nics) for h in hosts)
    return "rdma" if nics and one_fabric(cluster.hosts[h].fabric for h in hosts) else "socket"
