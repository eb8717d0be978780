"""Scripted faults: `kill a0@5`, `stop a0@5:2`, `cut a0@5:2`, `cut a0/eth1@5`, `slow a0@5=0.1:10`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.runtime.sandbox.network import check_rate, lay_out
from heteromesh.runtime.sandbox.sandbox import Sandbox

Action = Literal["kill", "stop", "cut", "slow"]
SYNTAX = "kill HOST@T, stop HOST@T[:SECONDS], cut HOST[/NIC]@T[:SECONDS] or slow HOST[/NIC]@T=GBIT[:SECONDS]"
_NUMBER = r"\d+(?:\.\d+)?"
_SPEC = re.compile(
    rf"\s*(?P<action>kill|stop|cut|slow)\s+(?P<host>[^@/\s]+)(?:/(?P<nic>[^@\s]+))?"
    rf"@(?P<at>{_NUMBER})(?:=(?P<gbit>{_NUMBER}))?(?::(?P<seconds>{_NUMBER}))?\s*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to a host, `at` seconds after the start."""

    action: Action
    host: str
    at: float
    seconds: float | None = None
    """How long; None: for good."""
    nic: str = ""
    """The interface that is cut or slowed; empty: all of the host."""
    gbit: float = 0.0
    """Of `slow`: the rate each way."""

    @property
    def loses_host(self) -> bool:
        """Whether the host is out of the job from then on, so that its exit status doesn't count."""
        return self.action == "kill" or (self.action in ("stop", "cut") and self.seconds is None and not self.nic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something to do at a time."""

    at: float
    text: str
    apply: Callable[[], None]
    lost: str = ""
    """The host that is out of the job by it."""


def parse_fault(spec: str, cluster: Cluster) -> Fault:
    """Reads a fault; raises UserError for wrong syntax, an unknown host or interface, a rate out of range."""
    match = _SPEC.fullmatch(spec)
    where = f"--fault {spec!r}"
    if match is None:
        raise UserError(f"{where} is not understood: write {SYNTAX}")
    action = cast(Action, match["action"])
    if (action == "slow") != (match["gbit"] is not None):
        raise UserError(f"{where}: =GBIT belongs to slow and only there: write {SYNTAX}")
    if action == "kill" and match["seconds"]:
        raise UserError(f"{where}: what is killed stays so: write kill HOST@T")
    names = [host.name for host in cluster.hosts]
    if match["host"] not in names:
        raise UserError(f"{where}: the cluster has no host {match['host']!r}: use one of {', '.join(names)}")
    interfaces = [i.name for i in lay_out(cluster)[names.index(match["host"])]]
    if match["nic"] and (action in ("kill", "stop") or match["nic"] not in interfaces):
        raise UserError(f"{where}: {action} has no interface {match['nic']!r}: {SYNTAX}, NIC one of {interfaces}")
    if action in ("cut", "slow") and not interfaces:
        raise UserError(f"{where}: host {match['host']!r} has no NIC")
    if action == "slow":
        check_rate(float(match["gbit"]), where)
    return Fault(
        action=action,
        host=match["host"],
        nic=match["nic"] or "",
        at=float(match["at"]),
        seconds=float(match["seconds"]) if match["seconds"] else None,
        gbit=float(match["gbit"] or 0),
    )


def schedule(faults: Sequence[Fault], sandbox: Sandbox) -> list[Event]:
    """Returns the faults and their ends, in the order of time."""
    events = []
    for fault in faults:
        host, nic = sandbox[fault.host], fault.nic
        what = f"{fault.host}{'/' + nic if nic else ''}"
        actions: dict[Action, tuple[Callable[[], None], Callable[[], None]]] = {
            "kill": (host.kill, host.kill),
            "stop": (host.stop, host.resume),
            "cut": (partial(host.cut, nic), partial(host.plug, nic)),
            "slow": (partial(host.slow, fault.gbit, nic), partial(host.unslow, nic)),
        }
        begin, end = actions[fault.action]
        rate = f" to {fault.gbit:g} Gbit/s" if fault.action == "slow" else ""
        lost = fault.host if fault.loses_host else ""
        events.append(Event(at=fault.at, text=f"{fault.action} {what}{rate}", apply=begin, lost=lost))
        if fault.seconds is not None:
            over = f"end of {fault.action} {what}"
            events.append(Event(at=fault.at + fault.seconds, text=over, apply=end))
    return sorted(events, key=lambda event: event.at)
