"""Which part of the bytes between two hosts takes which of their cards, for the collectives of a reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heteromesh.planner.cluster import Cluster
from heteromesh.planner.flows import Flow, spread
from heteromesh.planner.links import NIC_UTILISATION
from heteromesh.planner.reduction import Reduction

Split = Mapping[tuple[int, int], tuple[tuple[float, ...], ...]]
"""By (host that sends, host that receives): [card of the sender][card of the receiver], adding up to 1."""
_LEAST_FLOW = 1e-3
"""Of the tensor: between hosts that own nothing only an all-to-all moves bytes, and these need a way too."""


def card_rates(cluster: Cluster) -> tuple[tuple[float, ...], ...]:
    """Per host, bytes per second each way of every Ethernet card, in the file's order."""
    return tuple(
        tuple(
            nic.gbit * 1e9 / 8 * NIC_UTILISATION
            for nic in host.nics
            if nic.kind == "ethernet"
            for _ in range(nic.count)
        )
        for host in cluster.hosts
    )


def split(reduction: Reduction, cards: Sequence[Sequence[float]]) -> Split:
    """Keeps the busiest card's time of an all-reduce least (planner/flows.py).

    Host i sends host j its contribution to j's part and the results of its own: F_i + F_j of the tensor. When a card
    degrades, call again with what it still does (`flows.degraded`); 0: down.

    Args:
        cards: per host, bytes per second each way of every card.

    Raises UserError for negative rates and for a host whose cards are all down.
    """
    hosts = sorted(set(reduction.hosts))
    owned = {h: sum(f for f, its in zip(reduction.fractions, reduction.hosts, strict=True) if its == h) for h in hosts}
    pairs = [(i, j) for i in hosts for j in hosts if i != j]
    flows = [Flow(source=i, target=j, size=max(owned[i] + owned[j], _LEAST_FLOW)) for i, j in pairs]
    return dict(zip(pairs, spread(flows, cards).fractions, strict=True))
