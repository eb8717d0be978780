"""A cluster's NICs as virtual Ethernet pairs: one namespace a host, one namespace with a switch for each network.

Ethernet cards are on one switch, the InfiniBand or RoCE cards of a fabric on one of their own (they carry IP here).
Each end of a pair sends at most at the card's rate (token bucket), so each direction has the rate of its own.
A host's cards of one network have an address each; the address a socket is bound to decides which card it sends by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.runtime.sandbox.machine import ToolError, batch, call

MOST_GBIT = 20.0
"""What a pair carries on a usual machine, where each packet costs CPU time."""
LEAST_GBIT = 1e-4
MOST_HOSTS = 200
MOST_NICS = 16
MTU = 9000
BURST_SECONDS = 0.002
LEAST_BURST = 20_000
"""Bytes: two frames."""
QUEUE_SECONDS = 0.01
"""Of packets that wait for the link; a switch's buffer. TCP keeps the rate with it, and others wait no longer."""
_PREFIX = {"ethernet": "eth", "infiniband": "ib", "roce": "roce"}
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualNic:
    """One card of a host."""

    name: str
    """In the host: eth0, eth1, ib0, roce0, ..."""
    port: str
    """The pair's other end, in the hub's namespace."""
    switch: str
    address: str
    gbit: float


def lay_out(cluster: Cluster) -> tuple[tuple[VirtualNic, ...], ...]:
    """Returns the interfaces of every host; raises UserError for what can't be emulated."""
    if len(cluster.hosts) > MOST_HOSTS:
        raise UserError(
            f"the cluster has {len(cluster.hosts)} hosts and a sandbox at most {MOST_HOSTS}: leave some out"
        )
    networks: dict[str, int] = {}
    hosts = []
    for h, host in enumerate(cluster.hosts):
        if not _HOST_NAME.fullmatch(host.name):
            raise UserError(
                f"host {host.name!r} can't be named so on Linux: use up to 63 letters, digits, '-', '.' and '_'"
            )
        cards = [nic for nic in host.nics for _ in range(nic.count)]
        if len(cards) > MOST_NICS:
            raise UserError(f"host {host.name!r} has {len(cards)} NICs and a sandbox at most {MOST_NICS} a host")
        interfaces: list[VirtualNic] = []
        for c, nic in enumerate(cards):
            check_rate(nic.gbit, f"host {host.name!r}: a NIC")
            shared = (
                "ethernet"
                if nic.kind == "ethernet"
                else f"fabric {host.fabric}"
                if host.fabric
                else f"only {host.name}"
            )
            network = networks.setdefault(shared, len(networks))
            same = sum(i.name.startswith(_PREFIX[nic.kind]) for i in interfaces)
            interfaces.append(
                VirtualNic(
                    name=f"{_PREFIX[nic.kind]}{same}",
                    port=f"h{h}n{c}",
                    switch=f"switch{network}",
                    address=f"10.{20 + network}.{c}.{h + 1}",
                    gbit=nic.gbit,
                )
            )
        hosts.append(tuple(interfaces))
    return tuple(hosts)


def check_rate(gbit: float, where: str) -> None:
    """Raises UserError for a rate that can't be emulated."""
    if not LEAST_GBIT <= gbit <= MOST_GBIT:
        raise UserError(
            f"{where} of {gbit:g} Gbit/s can't be emulated: a virtual link carries {LEAST_GBIT:g} to {MOST_GBIT:g} "
            "Gbit/s, so change all links alike with --scale FACTOR"
        )


def control_switch(hosts: tuple[tuple[VirtualNic, ...], ...]) -> str:
    """Returns the network that every host is on, Ethernet if there is one; empty for a host without NICs."""
    shared = [s for s in dict.fromkeys(i.switch for i in hosts[0]) if all(any(i.switch == s for i in h) for h in hosts)]
    ethernet = {i.switch for host in hosts for i in host if i.name.startswith(_PREFIX["ethernet"])}
    return next((s for s in shared if s in ethernet), shared[0] if shared else "")


class VirtualNetwork:
    """The namespaces and links of `hosts`; `name` is the hub's namespace and begins the others' names."""

    def __init__(self, name: str, hosts: tuple[tuple[VirtualNic, ...], ...], latency_ms: float) -> None:
        self.name, self.hosts = name, hosts
        self.namespaces = tuple(f"{name}-{i}" for i in range(len(hosts)))
        self._latency_ms = latency_ms

    def create(self) -> None:
        """Makes all; raises UserError where the kernel lacks what it takes."""
        try:
            call("ip", "netns", "add", self.name)
        except ToolError as error:
            raise UserError(
                f"this machine makes no network namespaces ({error}): run as root outside of a container, or in a "
                "privileged one"
            ) from None
        if self._latency_ms:
            self._check_latency()
        switches = dict.fromkeys(i.switch for host in self.hosts for i in host)
        batch("ip", self.name, (f"link add {s} type bridge\nlink set {s} up" for s in switches))
        for namespace, interfaces in zip(self.namespaces, self.hosts, strict=True):
            call("ip", "netns", "add", namespace)
            self._join(namespace, interfaces)

    def _join(self, namespace: str, interfaces: tuple[VirtualNic, ...]) -> None:
        # with several cards in one network, only the one that is asked for answers
        settings = {"net/ipv4/conf/all/arp_ignore": 1, "net/ipv4/conf/all/arp_announce": 2}
        if Path("/proc/sys/net/ipv6").exists():
            settings["net/ipv6/conf/all/disable_ipv6"] = 1
        script = "; ".join(f"echo {value} > /proc/sys/{key}" for key, value in settings.items())
        # BBR halts now and then to probe, which blurs rates; a namespace may lack the right to choose cubic
        script += "; for c in cubic reno; do echo $c 2>&- > /proc/sys/net/ipv4/tcp_congestion_control && break; done"
        call("ip", "netns", "exec", namespace, "sh", "-e", "-c", script)
        pairs, inside, limits, ports = [], ["link set lo up"], [], []
        for table, i in enumerate(interfaces, start=101):
            pairs.append(f"link add {i.port} mtu {MTU} type veth peer name {i.name} mtu {MTU} netns {namespace}")
            pairs.append(f"link set {i.port} master {i.switch} up")
            network = i.address.split(".")[1]
            inside.append(f"address add {i.address}/16 dev {i.name}\nlink set {i.name} up")
            inside.append(f"route add 10.{network}.0.0/16 dev {i.name} src {i.address} table {table}")
            inside.append(f"rule add from {i.address} table {table}")
            limits.append(f"qdisc add dev {i.name} root handle 1: {_bucket(i.gbit)}")
            if self._latency_ms:
                limits.append(f"qdisc add dev {i.name} parent 1:1 handle 10: {_delay(self._latency_ms)}")
            ports.append(f"qdisc add dev {i.port} root handle 1: {_bucket(i.gbit)}")
        batch("ip", self.name, pairs)
        batch("ip", namespace, inside)
        batch("tc", namespace, limits)
        batch("tc", self.name, ports)

    def _check_latency(self) -> None:
        try:
            call("tc", "-n", self.name, "qdisc", "add", "dev", "lo", "root", *_delay(self._latency_ms).split())
        except ToolError:
            raise UserError(
                f"a latency of {self._latency_ms:g} ms can't be emulated: this kernel has no netem: load sch_netem or "
                "leave --latency-ms out"
            ) from None
        call("tc", "-n", self.name, "qdisc", "del", "dev", "lo", "root")

    def remove(self) -> None:
        """Removes what `create` made, also where it got half-way."""
        existing = {line.split()[0] for line in call("ip", "netns", "list").splitlines() if line}
        for namespace in (self.name, *self.namespaces):
            if namespace in existing:
                call("ip", "netns", "del", namespace)

    def set_up(self, interface: VirtualNic, up: bool) -> None:
        """Plugs the cable in or pulls it: the host sees its carrier go."""
        call("ip", "-n", self.name, "link", "set", interface.port, "up" if up else "down")

    def set_rate(self, host: int, interface: VirtualNic, gbit: float) -> None:
        """Sets another rate, both ways."""
        for namespace, device in ((self.namespaces[host], interface.name), (self.name, interface.port)):
            words = f"qdisc change dev {device} root handle 1: {_bucket(gbit)}"
            call("tc", "-n", namespace, *words.split())


def _bucket(gbit: float) -> str:
    per_second = gbit * 1e9 / 8
    burst = max(LEAST_BURST, per_second * BURST_SECONDS)
    queue = max(20 * MTU, per_second * QUEUE_SECONDS)
    return f"tbf rate {gbit * 1e9:.0f}bit burst {burst:.0f} limit {queue:.0f}"


def _delay(milliseconds: float) -> str:
    return f"netem delay {milliseconds:g}ms limit 100000"
