"""Which part of the bytes between two hosts takes which of their NICs, for the collectives of a reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.planner.cluster.links import NIC_UTILISATION, cluster_links
from heteromesh.planner.reduction.flows import Flow, spread
from heteromesh.planner.reduction.reduction import RING_MARGIN, Reduction, plan_reduction, reduction_for

Split = Mapping[tuple[int, int], tuple[tuple[float, ...], ...]]
"""By (host that sends, host that receives): [NIC of the sender][NIC of the receiver], adding up to 1."""
_LEAST_FLOW = 1e-3
"""Of the tensor: between hosts that own nothing only an all-to-all moves bytes, and these need a way too."""


def nic_rates(cluster: Cluster) -> tuple[tuple[float, ...], ...]:
    """Returns by host the bytes per second each way of every Ethernet NIC, in the file's order."""
    return tuple(
        tuple(
            nic.gbit * 1e9 / 8 * NIC_UTILISATION
            for nic in host.nics
            if nic.kind == "ethernet"
            for _ in range(nic.count)
        )
        for host in cluster.hosts
    )


def several_nics(cluster: Cluster) -> bool:
    """Returns whether some host has more than one Ethernet NIC, and every host one at least."""
    counts = [len(rates) for rates in nic_rates(cluster)]
    return len(counts) > 1 and min(counts) > 0 and max(counts) > 1


def over_one_nic(cluster: Cluster, *, max_fraction: Sequence[float] | None = None, in_waves: bool = True) -> Reduction:
    """Returns the reduction of collectives that use one NIC of each host: what was measured, else the first Ethernet
    NIC.
    """
    if cluster.measured.nic_gbit or not several_nics(cluster):
        return reduction_for(cluster, max_fraction=max_fraction, in_waves=in_waves)
    hosts = tuple(_with_one_nic(host) for host in cluster.hosts)
    return reduction_for(replace(cluster, hosts=hosts), max_fraction=max_fraction, in_waves=in_waves)


def over_all_nics(cluster: Cluster, *, max_fraction: Sequence[float] | None = None) -> Reduction:
    """Returns the reduction of collectives that use every Ethernet NIC: a host's uplink is the sum of its NICs."""
    links = cluster_links(cluster)
    uplinks = [sum(rates) for rates in nic_rates(cluster)]
    return plan_reduction(links.hosts, uplinks, links.link, max_fraction=max_fraction)


def all_nics_pay(cluster: Cluster, *, max_fraction: Sequence[float] | None = None) -> bool:
    """Returns whether an all-reduce over all NICs is predicted to be clearly faster than the better way over one."""
    if not several_nics(cluster):
        return False
    one, every = (make(cluster, max_fraction=max_fraction) for make in (over_one_nic, over_all_nics))
    best = min(one.seconds_per_byte, one.ring_seconds_per_byte)
    return every.seconds_per_byte * (1 + RING_MARGIN) < best


def split(reduction: Reduction, nics: Sequence[Sequence[float]]) -> Split:
    """Keeps the busiest NIC's time of an all-reduce least (planner/reduction/flows.py).

    Host i sends host j its contribution to j's part and the results of its own: F_i + F_j of the tensor. When a NIC
    degrades, call again with what it still does; 0: down.

    Args:
        NICs: per host, bytes per second each way of every NIC.

    Raises UserError for negative rates and for a host whose NICs are all down.
    """
    hosts = sorted(set(reduction.hosts))
    owned = {h: sum(f for f, its in zip(reduction.fractions, reduction.hosts, strict=True) if its == h) for h in hosts}
    pairs = [(i, j) for i in hosts for j in hosts if i != j]
    flows = [Flow(source=i, target=j, size=max(owned[i] + owned[j], _LEAST_FLOW)) for i, j in pairs]
    return dict(zip(pairs, spread(flows, nics).fractions, strict=True))


def _with_one_nic(host: Host) -> Host:
    """Returns the host with the first of its Ethernet NICs alone."""
    rest = tuple(nic for nic in host.nics if nic.kind != "ethernet")
    first: Nic = next(nic for nic in host.nics if nic.kind == "ethernet")
    return replace(host, nics=(replace(first, count=1), *rest))
