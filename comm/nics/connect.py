"""Opens connections between all NICs of all hosts, with a gloo group to exchange addresses."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Sequence

import torch.distributed as dist

from heteromesh.comm.nics.schedule import DeficitRoundRobin, connection_shares, nic_pair
from heteromesh.comm.tcp.abort import Abort, GroupAborted
from heteromesh.comm.tcp.connect import Address, Place, build
from heteromesh.comm.tcp.listen import Listener
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.comm.world import gather_over
from heteromesh.errors import UserError
from heteromesh.planner.reduction.nics import Split

SECONDS = 60.0


def open_nics(
    group: dist.ProcessGroup,
    addresses: Sequence[str],
    hosts: Sequence[int],
    nics: Sequence[int],
    split: Split,
    *,
    seconds: float = SECONDS,
    connect_seconds: float = SECONDS,
) -> TcpTransport:
    """Connects the ranks of the group over every NIC of their hosts, all of them at once.

    Args:
        group: a gloo group that sees nothing else meanwhile; it stays the caller's.
        addresses: this host's NICs, one address each, in the order of `split`. A socket bound to an address must
            leave by that NIC (a routing rule for each source address).
        hosts: per rank, its host.
        nics: per host, how many it has.
        split: planner/reduction/nics.py's.
        seconds: how long a peer may be silent to the kernel.
        connect_seconds: how long connecting may take.

    Raises UserError for addresses that this machine does not have, or too few or too many, and GroupAborted when not
    all could be connected.
    """
    rank = group.rank()
    secret = gather_over(group, secrets.token_bytes(32) if rank == 0 else b"")[0]
    listener, problem = _listen(rank, secret, addresses, nics[hosts[rank]])
    try:
        told = gather_over(group, (listener.addresses if listener else (), problem))
        if problems := [its for _, its in told if its]:
            raise UserError(problems[0])
        assert listener is not None
        sockets = _connect(listener, secret, rank, [given for given, _ in told], max(nics), connect_seconds)
    finally:
        if listener is not None:
            listener.close()
    for sock in (sock for ends in sockets.values() for sock in ends):
        _limit(sock, seconds)
    schedulers = {peer: DeficitRoundRobin(connection_shares(rank, peer, hosts, nics, split)) for peer in sockets}
    return TcpTransport(rank=rank, size=len(hosts), epoch=0, sockets=sockets, abort=Abort(), schedulers=schedulers)


def _listen(rank: int, secret: bytes, addresses: Sequence[str], count: int) -> tuple[Listener | None, str]:
    """Returns a listener, or what is wrong: every rank must hear of it."""
    if len(addresses) != count:
        return None, f"rank {rank} has {len(addresses)} addresses and its host {count} NICs: give one address a NIC"
    try:
        return Listener(secret, addresses), ""
    except OSError as error:
        where = ", ".join(addresses)
        return None, f"rank {rank} can't listen at {where} ({error.strerror}): give the addresses of its own NICs"


def _connect(
    listener: Listener, secret: bytes, rank: int, given: Sequence[Sequence[Address]], most: int, seconds: float
) -> dict[int, list[socket.socket]]:
    """Returns, by peer, a connection for each `nic_pair`."""
    # `build` takes address i of both ends for connection i: as many addresses as connections, here in both orders
    pairs = [nic_pair(i, most, most, most) for i in range(most**2)]
    places = [[theirs[there % len(theirs)] for _, there in pairs] for theirs in given]
    places[rank] = [given[rank][here % len(given[rank])] for here, _ in pairs]
    abort, missing = Abort(), set[int]()
    late = threading.Timer(seconds, lambda: abort.set(_too_late(seconds, missing)))
    late.start()
    try:
        place = Place(addresses=places, rank=rank, epoch=0, group="nics", links=len(pairs))
        built = build(listener, place, secret, abort, missing)
    finally:
        late.cancel()
        late.join()
        abort.close()
    abort.check()  # it may have come between the last connection and the end of the wait
    return {peer: [link.sock for link in built.links_to(peer)] for peer in range(len(given)) if peer != rank}


def _too_late(seconds: float, missing: set[int]) -> GroupAborted:
    ranks = ", ".join(map(str, sorted(missing)))
    return GroupAborted(f"no connection over every NIC with ranks {ranks} within {seconds:g} s: check the NICs' routes")


def _limit(sock: socket.socket, seconds: float) -> None:
    """Makes the kernel give a peer up that it hears nothing from for so long, whether something is under way or not."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(int(seconds / 2), 1))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(int(seconds / 6), 1))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
