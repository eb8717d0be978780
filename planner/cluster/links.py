"""How fast a set of ranks exchanges data: device links inside a host, NICs between hosts.

Of the bytes a rank sends inside a set of d ranks, k of them on its own host, (k-1)/(d-1) stay on the host and
(d-k)/(d-1) leave it; the host's NICs are shared by its k members. Both ways are used at once, so the slower one
decides, and the slowest member decides for the set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from heteromesh.planner.cluster.cluster import Cluster, Host

LINK_UTILISATION = 0.3
"""Of a device link's peak; what FlexSP's all-to-all rates on A100s come to at degrees 2 to 8: 0.2 to 0.28."""
NIC_UTILISATION = 0.75
"""Of the NICs' peak; FlexSP's rates at degrees 16, 32 and 64 come to 0.83, 0.71 and 0.68."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Sustained rates of a cluster in bytes per second each way; callable as `Costs.rate`."""

    hosts: tuple[int, ...]
    """Per rank, its host."""
    link: tuple[float, ...]
    """Per host, one device's link to the others."""
    fabrics: tuple[str, ...]
    """Per host; empty: on none."""
    fabric_nics: tuple[float, ...]
    """Per host, all NICs that reach hosts on its fabric."""
    ethernet: tuple[float, ...]
    """Per host, all NICs that reach any host."""
    _memo: dict[tuple[int, ...], float] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def by_degree(self) -> bool:
        """Whether nothing but the number of ranks matters: here their hosts do."""
        return False

    def host_key(self, host: int) -> object:
        """Returns the rates of a host's links, and its fabric."""
        return self.link[host], self.fabrics[host], self.fabric_nics[host], self.ethernet[host]

    def __call__(self, ranks: Sequence[int]) -> float:
        """Returns bytes per second each way of the slowest member of a set of two ranks or more."""
        key = tuple(self.hosts[r] for r in ranks)
        rate = self._memo.get(key)
        if rate is None:
            rate = self._memo[key] = self._slowest(Counter(key))
        return rate

    def around(self, ranks: Sequence[int], inner: int) -> float:
        """Returns bytes per second each way of the slowest member when every rank sends to the one `inner` places
        before it.

        A host's NICs carry the messages of those of its ranks whose receiver is on another host: one rank's in a
        plain ring, those of `inner` neighbours where these form the places of a ring.
        """
        key = (inner, -1, *(self.hosts[r] for r in ranks))
        rate = self._memo.get(key)
        if rate is None:
            hosts = key[2:]
            leaving = Counter(h for i, h in enumerate(hosts) if hosts[i - inner] != h)
            present = list(set(hosts))
            local = [self.link[h] for i, h in enumerate(hosts) if hosts[i - inner] == h]
            rate = self._memo[key] = min([*local, *(self.uplink(h, present) / n for h, n in leaving.items())])
        return rate

    def gathering(self, ranks: Sequence[int], shares: Sequence[float]) -> float:
        """Returns seconds a byte of the whole, of which the ranks hold these shares, until every rank has all of it.

        A rank sends its share to each other one and receives theirs, both ways at once; so a slow NIC costs less the
        smaller the share behind it. With equal shares, equal to the rate of an exchange of everyone with everyone.
        """
        held: dict[int, list[float]] = {}
        for rank, share in zip(ranks, shares, strict=True):
            held.setdefault(self.hosts[rank], []).append(share)
        hosts, slowest = list(held), 0.0
        for host, own in held.items():
            inside, count = sum(own), len(own)
            local = max(max(share * (count - 1), inside - share) for share in own) / self.link[host]
            leaving, arriving = inside * (len(ranks) - count), (1 - inside) * count
            remote = max(leaving, arriving) / self.uplink(host, hosts) if len(hosts) > 1 else 0.0
            slowest = max(slowest, local, remote)
        return slowest

    def ring_rate(self) -> float:
        """Returns bytes per second each way around a ring of all ranks, which crosses each host's NICs once."""
        present = sorted(set(self.hosts))
        slowest = min(self.link[h] for h in present)
        return slowest if len(present) == 1 else min(slowest, *(self.uplink(h, present) for h in present))

    def uplink(self, host: int, hosts: Sequence[int]) -> float:
        """Returns bytes per second each way between a host and the others of a set of hosts, by all NICs that reach
        them.

        RDMA NICs count where all hosts of the set are on one fabric; elsewhere Ethernet NICs alone.
        """
        return self.fabric_nics[host] if one_fabric(self.fabrics[h] for h in hosts) else self.ethernet[host]

    def _slowest(self, members: Counter[int]) -> float:
        others = max(sum(members.values()) - 1, 1)
        seconds_per_byte = 0.0
        for host, count in members.items():
            local = (count - 1) / others / self.link[host]
            remote = 0.0
            if len(members) > 1:
                remote = (others + 1 - count) / others * count / self.uplink(host, list(members))
            seconds_per_byte = max(seconds_per_byte, local, remote)
        return 1 / seconds_per_byte if seconds_per_byte else self.link[next(iter(members))]


def one_fabric(fabrics: Iterable[str]) -> bool:
    """Returns whether RDMA reaches among hosts on these fabrics (empty: on none)."""
    present = set(fabrics)
    return len(present) == 1 and "" not in present


def cluster_links(cluster: Cluster) -> Links:
    """Returns the links of a cluster: measured, else peaks times the utilisations above.

    The measured rates of NICs are those of the one communicator that passes used: RDMA where all hosts of the whole
    cluster are on one fabric, else sockets.
    """
    hosts, measured = cluster.hosts, cluster.measured
    link = tuple(cluster.devices[host.device].link_gbps * 1e9 * LINK_UTILISATION for host in hosts)
    fabric = tuple(_rate(host, ("infiniband", "roce")) or _rate(host, ("ethernet",)) for host in hosts)
    ethernet = tuple(_rate(host, ("ethernet",)) for host in hosts)
    if measured.link_gbps:
        link = tuple(gbps * 1e9 for gbps in measured.link_gbps)
    if measured.nic_gbit:
        slower_way = tuple(min(ways) * 1e9 / 8 for ways in measured.nic_gbit)
        same = one_fabric(host.fabric for host in cluster.whole.hosts)
        fabric, ethernet = (slower_way, ethernet) if same else (fabric, slower_way)
    return Links(
        hosts=cluster.rank_hosts,
        link=link,
        fabrics=tuple(host.fabric for host in hosts),
        fabric_nics=fabric,
        ethernet=ethernet,
    )


def _rate(host: Host, kinds: tuple[str, ...]) -> float:
    return sum(nic.gbit * nic.count for nic in host.nics if nic.kind in kinds) * 1e9 / 8 * NIC_UTILISATION
