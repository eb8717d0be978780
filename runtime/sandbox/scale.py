"""A real cluster's links, all slower by one factor, so that this machine can carry them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.files import cluster_toml


def scaled(cluster: Cluster, factor: float) -> Cluster:
    """Returns the cluster with every card's rate, nominal and measured, divided by `factor` (> 0); the rest as it was.

    Their ratios stay, and so does what the planner decides by bandwidth; by what compute hides them no longer does.
    """
    hosts = tuple(
        replace(host, nics=tuple(replace(nic, gbit=nic.gbit / factor) for nic in host.nics)) for host in cluster.hosts
    )
    rates = tuple((out / factor, into / factor) for out, into in cluster.measured.nic_gbit)
    return replace(cluster, hosts=hosts, measured=replace(cluster.measured, nic_gbit=rates))


@contextmanager
def scaled_file(cluster: Cluster, path: Path, factor: float) -> Iterator[tuple[Cluster, Path]]:
    """Yields `scaled` and a file of it, for as long as the block lasts; with a factor of 1, what was given."""
    if factor == 1:
        yield cluster, path
        return
    slower = scaled(cluster, factor)
    with tempfile.TemporaryDirectory(prefix="heteromesh-") as folder:
        copy = Path(folder) / "cluster.toml"
        copy.write_text(cluster_toml(slower, f"{path.name} with NICs of 1/{factor:g} of the rate"))
        yield slower, copy
