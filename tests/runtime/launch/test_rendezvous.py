"""Where the coordinator is, and what is said when it can't be there or can't be reached."""

import socket

import pytest
from members import free_addresses

from heteromesh.errors import UserError
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.runtime.launch.rendezvous import is_here, meet, route_to
from heteromesh.runtime.process.failure import PeerLost

SECRET = "0123456789abcdef" * 4
LOCAL = "127.0.0.1"


def test_a_port_of_another_program_is_named():
    with socket.socket() as taken:
        taken.bind((LOCAL, 0))
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on {LOCAL}:{port}.*a port of its own"):
            meet([(LOCAL, port)], SECRET.encode(), Bounds(), Timing(patience=1.0), hosts=[], say=lambda _: None)


def test_a_blocked_port_is_named_from_where_to_where(monkeypatch):
    monkeypatch.setattr("heteromesh.runtime.launch.rendezvous.is_here", lambda host: False)
    told = []
    port = free_addresses(1)[0][1]
    with pytest.raises(
        PeerLost, match=rf"reaches no coordinator at {LOCAL}:{port} \(.*refused.*tried from {LOCAL} for 0.6 s"
    ):
        meet([(LOCAL, port)], SECRET.encode(), Bounds(), Timing(patience=0.6), hosts=[], say=told.append)
    assert told == [f"no coordinator at {LOCAL}:{port} yet, waiting 1 s more"]


def test_a_name_that_leads_back_to_this_host_is_refused(monkeypatch):
    """As Debian writes /etc/hosts."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: look_up("127.0.1.1", *a, **k))
    with pytest.raises(UserError, match=r"--rdzv-endpoint has a0, which is 127.0.1.1 here.*the address that they know"):
        meet([("a0", 1)], SECRET.encode(), Bounds(), Timing(patience=0.1), hosts=[], say=lambda _: None)


def test_addresses_of_this_host():
    assert is_here(LOCAL)
    assert not is_here("192.0.2.1")
    assert not is_here("no.such.host.invalid")
    assert route_to((LOCAL, 1)) == LOCAL
    with pytest.raises(UserError, match="can't be reached from this host"):
        route_to(("no.such.host.invalid", 1))
