"""Builds the connections of one epoch of one group: all at once, in milliseconds, abortable while it waits."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from heteromesh.comm.tcp.abort import Abort, GroupAborted
from heteromesh.comm.tcp.auth import Connector
from heteromesh.comm.tcp.listen import Claim, Listener
from heteromesh.comm.tcp.transport import TcpTransport

Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One member of a group in one epoch, as every member knows it."""

    addresses: Sequence[Sequence[Address]]
    """By rank: where it listens, one address for each of its NICs that may be used."""
    rank: int
    epoch: int
    group: str = "world"
    links: int = 1
    """Connections between each two ranks; link i uses NIC i modulo their number on both ends."""


class _Dial:
    """An outgoing connection in the making."""

    def __init__(self, place: Place, peer: int, link: int, secret: bytes) -> None:
        self.peer, self.link = peer, link
        theirs, ours = place.addresses[peer], place.addresses[place.rank]
        target = theirs[link % len(theirs)]
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(ours) > 1:
            # the source address decides which NIC the connection leaves by (with a routing rule for each)
            self.sock.bind((ours[link % len(ours)][0], 0))
        claim = Claim(place.group, place.epoch, place.rank, link)
        self._connector = Connector(secret, claim.pack())
        with suppress(BlockingIOError):
            self.sock.connect(tuple(target))

    def advance(self) -> bool:
        """Goes on after an event; returns True when the other end has proved itself. Raises OSError."""
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        return self._connector.advance(self.sock)


def build(
    listener: Listener, place: Place, secret: bytes, abort: Abort, missing: set[int] | None = None
) -> TcpTransport:
    """Connects this rank with every other; each rank dials the lower ones. Blocks until all are there.

    `missing` is kept up to date with the ranks that are waited for, for other threads to read.

    Raises GroupAborted when the state is set meanwhile, or a peer refuses the connection or cannot prove itself (its
    rank is in the exception); the state is set then.
    """
    poll = select.epoll()
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    made: dict[tuple[int, int], socket.socket] = {}
    dials: dict[int, _Dial] = {}
    try:
        poll.register(abort.fileno(), select.EPOLLIN)
        poll.register(bell, select.EPOLLIN)
        listener.expect(place.group, place.epoch, _ring(bell))
        for peer in range(place.rank):
            for link in range(place.links):
                _dial(place, peer, link, secret, abort, dials, poll)
        while True:
            abort.check()
            made.update(_arrived(listener, place))
            absent = _absent(place, made)
            if missing is not None:
                missing.intersection_update(absent)
                missing.update(absent)
            if not absent:
                break
            for fd, _ in poll.poll():
                if fd == bell:
                    with suppress(BlockingIOError):
                        os.eventfd_read(bell)
                elif fd in dials:
                    _advance(fd, dials, made, poll, abort)
        return _transport(place, made, abort)
    except BaseException:
        for sock in (*made.values(), *(dial.sock for dial in dials.values())):
            sock.close()
        raise
    finally:
        poll.close()
        listener.expect(place.group, place.epoch, _nothing)
        os.close(bell)


def _absent(place: Place, made: dict[tuple[int, int], socket.socket]) -> set[int]:
    others = set(range(len(place.addresses))) - {place.rank}
    return {peer for peer in others if any((peer, link) not in made for link in range(place.links))}


def _nothing() -> None:
    """Does nothing: nobody waits for more connections of this epoch."""


def _ring(bell: int) -> Callable[[], None]:
    def ring() -> None:
        with suppress(OSError):  # the build has just ended
            os.eventfd_write(bell, 1)

    return ring


def _dial(
    place: Place, peer: int, link: int, secret: bytes, abort: Abort, dials: dict[int, _Dial], poll: select.epoll
) -> None:
    try:
        dial = _Dial(place, peer, link, secret)
    except OSError as error:
        raise _unreachable(abort, peer, error) from None
    dials[dial.sock.fileno()] = dial
    poll.register(dial.sock.fileno(), select.EPOLLIN)


def _advance(
    fd: int, dials: dict[int, _Dial], made: dict[tuple[int, int], socket.socket], poll: select.epoll, abort: Abort
) -> None:
    dial = dials[fd]
    try:
        if not dial.advance():
            return
    except BlockingIOError:
        return
    except OSError as error:
        raise _unreachable(abort, dial.peer, error) from None
    poll.unregister(fd)
    made[dial.peer, dial.link] = dials.pop(fd).sock


def _unreachable(abort: Abort, peer: int, error: OSError) -> GroupAborted:
    failure = GroupAborted(f"rank {peer} could not be reached: {error}", peer=peer)
    abort.set(failure)
    return failure


def _arrived(listener: Listener, place: Place) -> dict[tuple[int, int], socket.socket]:
    arrived = {}
    for (rank, link), sock in listener.take(place.group, place.epoch).items():
        if place.rank < rank < len(place.addresses) and link < place.links:
            arrived[rank, link] = sock
        else:
            sock.close()
    return arrived


def _transport(place: Place, made: dict[tuple[int, int], socket.socket], abort: Abort) -> TcpTransport:
    size = len(place.addresses)
    sockets = {peer: [made[peer, link] for link in range(place.links)] for peer in range(size) if peer != place.rank}
    return TcpTransport(rank=place.rank, size=size, epoch=place.epoch, sockets=sockets, abort=abort)
