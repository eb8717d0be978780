"""Which host serves the coordinator of a job, and by which addresses a host is reached."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from heteromesh.comm.tcp.auth import AuthError
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.diagnosis.monitor import Monitor
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.control import Address, connect
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.runtime.launch.countdown import Say, wait_until
from heteromesh.runtime.process.environment import join_address
from heteromesh.runtime.process.failure import PeerLost

_TRY = 2.0
"""Seconds for one attempt to connect."""
_BETWEEN = 0.2
_REFUSALS = 3
"""Handshakes that end one after another before the secret counts as wrong: a candidate that gives up ends some too."""
_ELECTION = 2.0
"""Seconds within which members that lost their coordinator have another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Where the workers of this host find their job."""

    coordinators: Sequence[Address]
    hosts: Sequence[str]
    """Addresses of this host for the data plane."""
    coordinator: Coordinator | None
    """The one that this process serves."""


def meet_here(secret: bytes, bounds: Bounds, timing: Timing, say: Say) -> Rendezvous:
    """Returns a job of this host alone, on a free port. `say` gets what the coordinator finds wrong with members."""
    coordinator = Coordinator(secret, bounds=bounds, timing=timing, monitor=Monitor(say=say)).start()
    return Rendezvous(coordinators=[coordinator.address], hosts=["127.0.0.1"], coordinator=coordinator)


def meet(
    addresses: Sequence[Address],
    secret: bytes,
    bounds: Bounds,
    timing: Timing,
    *,
    hosts: Sequence[str],
    say: Say,
) -> Rendezvous:
    """Meets the other hosts: the one that has the first address serves the coordinator, unless one answers already.

    `hosts`: addresses of this host, if the user named any. Waits `timing.patience` seconds for a coordinator elsewhere.
    Raises UserError, and PeerLost when none answers.
    """
    for host, _ in addresses:
        _check_name(host)
    if not hosts:
        hosts = [route_to(addresses[0])]
    coordinator = None
    wrong = _missing(addresses, secret)
    if wrong and is_here(addresses[0][0]):
        coordinator = _serve(addresses, secret, bounds, timing, say)
    elif wrong:
        places = ", ".join(join_address(address) for address in addresses)
        wrong = wait_until(lambda: _missing(addresses, secret), timing.patience, f"no coordinator at {places} yet", say)
        if wrong:
            raise PeerLost(
                f"{wrong}, tried from {hosts[0]} for {timing.patience:g} s: start the job on the first of these hosts, "
                "or let its port through the firewalls between"
            )
    return Rendezvous(coordinators=addresses, hosts=hosts, coordinator=coordinator)


def is_here(host: str) -> bool:
    """Whether this is an address of this machine."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def route_to(address: Address) -> str:
    """Returns the address of this machine that packets to another one leave from. Raises UserError."""
    wrong = "no address"
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)
    except OSError as error:
        found, wrong = [], str(error.strerror or error)
    for family, kind, protocol, _, target in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(target)  # sends nothing
            except OSError as error:
                wrong = str(error.strerror or error)
                continue
            return str(probe.getsockname()[0])
    raise UserError(f"{join_address(address)} can't be reached from this host ({wrong}): name a host that can")


def _check_name(host: str) -> None:
    """Refuses the name of this host where /etc/hosts, as some systems write it, leads back to this host alone."""
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError:
        return  # told when it is needed
    if host not in (*found, "localhost") and all(ip_address(one).is_loopback for one in found):
        raise UserError(
            f"--rdzv-endpoint has {host}, which is {', '.join(sorted(found))} here, where other hosts can't reach it: "
            "give the address that they know it by"
        )


def _serve(addresses: Sequence[Address], secret: bytes, bounds: Bounds, timing: Timing, say: Say) -> Coordinator | None:
    host, port = addresses[0]
    if len(addresses) > 1:
        # members that have just lost the coordinator of this host are about to elect another: a second job beside
        # theirs would be worse than this pause
        time.sleep(_ELECTION)
        if not _missing(addresses, secret):
            return None
    try:
        return Coordinator(secret, host=host, port=port, bounds=bounds, timing=timing, monitor=Monitor(say=say)).start()
    except UserError:
        # another agent of the same job on this host may have been faster
        time.sleep(_BETWEEN)
        if not _missing(addresses, secret):
            return None
        raise


def _missing(addresses: Sequence[Address], secret: bytes) -> str:
    """Says why no coordinator of this job answers; empty: one does. Raises UserError when one has another secret."""
    for attempt in range(_REFUSALS if len(addresses) > 1 else 1):
        try:
            connect(addresses, secret, seconds=_TRY).close()
        except AuthError as error:
            refused = error
            time.sleep(_BETWEEN * attempt)
        except ConnectionError as error:
            return str(error)
        else:
            return ""
    raise UserError(f"{refused}: give every host of the job the same secret, and each job a port of its own") from None
