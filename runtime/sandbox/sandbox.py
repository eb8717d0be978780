"""The hosts of a cluster on this machine, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.runtime.sandbox.command import Seat
from heteromesh.runtime.sandbox.leftovers import free_name, remove_leftovers
from heteromesh.runtime.sandbox.machine import check_machine
from heteromesh.runtime.sandbox.network import VirtualNetwork, VirtualNic, check_rate, control_switch, lay_out
from heteromesh.runtime.sandbox.process import Process
from heteromesh.runtime.sandbox.quota import ControlGroups, find_controller, memory_limits, shares


class SandboxHost:
    """One host: a network namespace, interfaces of limited rate, and a share of the cores."""

    def __init__(
        self, network: VirtualNetwork, index: int, seat: Seat, hosts_file: str, groups: Sequence[Path]
    ) -> None:
        self.name, self.index = seat.names[index], index
        self.interfaces: tuple[VirtualNic, ...] = network.hosts[index]
        self.namespace = network.namespaces[index]
        self._network, self._seat, self._hosts_file, self._groups = network, seat, hosts_file, groups
        self._processes: list[Process] = []

    @property
    def address(self) -> str:
        """Returns the address by which all other hosts reach it; 127.0.0.1 for a host without NICs."""
        return next((i.address for i in self.interfaces if i.name == self._seat.interface), "127.0.0.1")

    def start(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, piped: bool = False
    ) -> Process:
        """Starts a command on this host; `environment` is added to this process's and the host's own."""
        process = Process(
            self._seat.command(command),
            host=self.name,
            namespace=self.namespace,
            hosts_file=self._hosts_file,
            groups=self._groups,
            environment=self._seat.environment(os.environ) | dict(environment or {}),
            piped=piped,
        )
        self._processes = [p for p in self._processes if p.poll() is None] + [process]
        return process

    def cut(self, interface: str = "") -> None:
        """Pulls the cable of one interface, or of all."""
        for i in self._chosen(interface):
            self._network.set_up(i, False)

    def slow(self, gbit: float, interface: str = "") -> None:
        """Sets another rate each way (Gbit/s) for one interface, or for each."""
        check_rate(gbit, f"host {self.name!r}: a link")
        for i in self._chosen(interface):
            self._network.set_rate(self.index, i, gbit)

    def plug(self, interface: str = "") -> None:
        """Undoes `cut`."""
        for i in self._chosen(interface):
            self._network.set_up(i, True)

    def unslow(self, interface: str = "") -> None:
        """Undoes `slow`."""
        for i in self._chosen(interface):
            self._network.set_rate(self.index, i, i.gbit)

    def restore(self) -> None:
        """Undoes every `cut`, `slow` and `stop`."""
        self.plug()
        self.unslow()
        self.resume()

    def kill(self) -> None:
        """Sends SIGKILL to every process of the host."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Sends SIGSTOP to every process of the host."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Sends SIGCONT to every process of the host."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends what still runs."""
        for process in self._processes:
            process.close()
        for process in self._processes:
            process.kill()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.signal(number, everyone=True)

    def _chosen(self, interface: str) -> tuple[VirtualNic, ...]:
        chosen = tuple(i for i in self.interfaces if interface in ("", i.name))
        if interface and not chosen:
            known = ", ".join(i.name for i in self.interfaces)
            raise UserError(f"host {self.name!r} has no interface {interface!r}: use one of {known}")
        return chosen


class Sandbox:
    """A context manager: the hosts of `cluster` exist inside of the block, and nothing of them after it.

    cores: how many of this machine's cores the hosts share (default: 90 %); quota=False: no CPU limits.
    limit_memory: a host that uses more memory than its devices have is killed.
    latency_ms: added one way between two hosts, where the kernel has netem.
    cluster_file: what processes find in HETEROMESH_CLUSTER.
    Raises UserError for what this machine can't emulate.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        cluster_file: Path | None = None,
        cores: float | None = None,
        quota: bool = True,
        limit_memory: bool = False,
        latency_ms: float = 0.0,
    ) -> None:
        self.cluster = cluster
        self.interfaces = lay_out(cluster)
        self.shares = shares(cluster, cores) if quota else ()
        self._limits: dict[str, Sequence[float]] = {"cpu": self.shares} if quota else {}
        if limit_memory:
            self._limits["memory"] = memory_limits(cluster)
        self.hosts: tuple[SandboxHost, ...] = ()
        self._file = str(cluster_file.resolve()) if cluster_file else ""
        self._latency_ms = latency_ms
        self._network: VirtualNetwork | None = None
        self._groups: list[ControlGroups] = []

    def __enter__(self) -> Sandbox:
        check_machine()
        remove_leftovers()
        try:
            self._create(free_name())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> SandboxHost:
        found = next((host for host in self.hosts if host.name == name), None)
        if found is None:
            raise UserError(f"the cluster has no host {name!r}: use one of {', '.join(h.name for h in self.hosts)}")
        return found

    def start(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, piped: bool = False
    ) -> tuple[Process, ...]:
        """Starts a command once per host, by torchrun's rendezvous where it is torchrun or `heteromesh run`."""
        return tuple(host.start(command, environment=environment, piped=piped) for host in self.hosts)

    def close(self) -> None:
        """Ends every process and removes every namespace and control group."""
        for host in self.hosts:
            host.close()
        self.hosts = ()
        for groups in self._groups:
            groups.remove()
        self._groups = []
        if self._network:
            self._network.remove()
            self._network = None

    def _create(self, name: str) -> None:
        self._network = VirtualNetwork(name, self.interfaces, self._latency_ms)
        self._network.create()
        for kind, limits in self._limits.items():
            self._groups.append(ControlGroups(name, limits, find_controller(kind)))
            self._groups[-1].create()
        names = tuple(host.name for host in self.cluster.hosts)
        switch = control_switch(self.interfaces)
        control = [next((i for i in host if i.switch == switch), None) for host in self.interfaces]
        addresses = [i.address if i else "127.0.0.1" for i in control]
        lines = [f"{address} {name}" for address, name in zip(addresses, names, strict=True)]
        # torch asks for the names of IPv4 peers of its IPv6 sockets, and warns where there is none
        lines += [f"::ffff:{address} {name}.mapped" for address, name in zip(addresses, names, strict=True)]
        hosts_file = "\n".join(["127.0.0.1 localhost", *lines, ""])
        self.hosts = tuple(
            SandboxHost(
                self._network,
                index,
                Seat(
                    index=index,
                    devices=host.count,
                    names=names,
                    interface=own.name if own else "",
                    master=addresses[0],
                    cluster_file=self._file,
                ),
                hosts_file,
                [groups.groups[index] for groups in self._groups],
            )
            for index, (host, own) in enumerate(zip(self.cluster.hosts, control, strict=True))
        )
