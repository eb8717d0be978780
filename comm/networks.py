"""What a process group needs to use a given network: options for its backend, never the environment."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.stages.fabric import Network, network_of

NCCL_NAMES: dict[Network, str] = {"rdma": "IB", "socket": "Socket"}
"""NCCL's names of its networks; RoCE is "IB" to it."""


def group_options(network: Network, backend: str) -> object | None:
    """Returns the `pg_options` of `torch.distributed.new_group` for a group on this network.

    With NCCL `ncclConfig_t.netName`, which holds for this group alone; None with gloo, which only has sockets. Raises
    UserError for another backend, and for NCCL where this torch was built without it.
    """
    if backend == "gloo":
        return None
    if backend != "nccl":
        raise UserError(f"backend {backend!r} has no choice of network: use nccl or gloo")
    if not dist.is_nccl_available():
        raise UserError("this torch was built without NCCL: use the gloo backend or a CUDA build of torch")
    options = dist.ProcessGroupNCCL.Options()
    options.config.net_name = NCCL_NAMES[network]  # type: ignore[attr-defined]  # torch's stub leaves it out
    return options


def device_options(
    cluster: Cluster | None, ranks: Sequence[int], device: torch.device, timeout: timedelta
) -> object | None:
    """Returns options of a group of these world ranks for tensors on their devices: the network that reaches them all.

    None, which is torch's own, on CPU ranks, where the hosts are not described, and for one host, which needs none.
    """
    if cluster is None or device.type != "cuda" or len({cluster.rank_hosts[r] for r in ranks}) == 1:
        return None
    options: Any = group_options(network_of(cluster, ranks), "nccl")
    options._timeout = timeout  # torch warns where this differs from the group's, which holds all the same
    return cast(object, options)
