"""Ranks in network namespaces of their own, each behind a link of limited rate (Linux, root, `ip` and `tc`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One namespace with one interface."""

    namespace: str
    interface: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command, to be run inside."""
        return ["ip", "netns", "exec", self.namespace, *words]


def available() -> bool:
    """Whether this machine lets us make namespaces."""
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))


@contextmanager
def hosts(count: int, mbit: float | None) -> Iterator[list[Host]]:
    """So many hosts on one switch; mbit limits what each sends and what each receives."""
    hub = f"hm{os.getpid()}"
    made = [Host(f"{hub}n{i}", f"{hub}e{i}"[-15:], f"10.77.0.{i + 1}") for i in range(count)]
    try:
        _run("ip", "netns", "add", hub)
        inside = ("ip", "netns", "exec", hub)
        _run(*inside, "ip", "link", "add", "switch", "type", "bridge")
        _run(*inside, "ip", "link", "set", "switch", "up")
        for i, host in enumerate(made):
            _run("ip", "netns", "add", host.namespace)
            _run(*inside, "ip", "link", "add", f"port{i}", "type", "veth", "peer", "name", host.interface)
            _run(*inside, "ip", "link", "set", host.interface, "netns", host.namespace)
            _run(*inside, "ip", "link", "set", f"port{i}", "master", "switch", "up")
            _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", host.interface))
            _run(*host.command("ip", "link", "set", host.interface, "up"))
            _run(*host.command("ip", "link", "set", "lo", "up"))
            if mbit:
                limit = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms")
                _run(*host.command("tc", "qdisc", "add", "dev", host.interface, *limit))
                _run(*inside, "tc", "qdisc", "add", "dev", f"port{i}", *limit)
        yield made
    finally:
        for name in (hub, *(h.namespace for h in made)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
