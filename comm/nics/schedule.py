"""Which connection a message takes where two hosts have several NICs: the one furthest behind its planned share."""

from __future__ import annotations

from collections.abc import Sequence

from heteromesh.comm.tcp.link import LinkScheduler, Message, Outbox
from heteromesh.planner.reduction.nics import Split

_WHOLE = 1 << 31
"""Messages are not cut: collectives send pieces already."""


class DeficitRoundRobin(LinkScheduler):
    """Deals messages to one peer out to its connections by deficit round robin.

    Every message earns each connection its share of the bytes as credit, and the one with the most credit takes the
    message: after any number of messages a connection is at most one message per connection off its share. The shares
    are this end's choice alone: the frames say where their bytes belong.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = tuple(shares)
        self._credit = [0.0] * len(shares)
        self._outboxes = [Outbox(0, _WHOLE) for _ in shares]

    def __bool__(self) -> bool:
        return any(self._outboxes)

    def put(self, message: Message) -> None:
        size = len(message.view)
        self._credit = [c + share * size for c, share in zip(self._credit, self._shares, strict=True)]
        chosen = max((i for i, share in enumerate(self._shares) if share), key=self._credit.__getitem__)
        self._credit[chosen] -= size
        self._outboxes[chosen].put(message)

    def outbox(self, place: int) -> Outbox:
        return self._outboxes[place]


def connection_shares(rank: int, peer: int, hosts: Sequence[int], nics: Sequence[int], split: Split) -> list[float]:
    """Returns, for each of the connections from `rank` to `peer`, its share of the bytes.

    Args:
        hosts: per rank, its host.
        nics: per host, how many it has.
        split: planner/reduction/nics.py's.
    """
    mine, theirs, most = hosts[rank], hosts[peer], max(nics)
    if mine == theirs:
        return [1.0] + [0.0] * (most**2 - 1)
    if rank > peer:
        pairs = [nic_pair(i, most, nics[mine], nics[theirs]) for i in range(most**2)]
    else:
        pairs = [nic_pair(i, most, nics[theirs], nics[mine])[::-1] for i in range(most**2)]
    fractions = split[mine, theirs]
    # with fewer NICs on a host than on another, several connections join the same two NICs: one carries all
    return [fractions[a][b] if pairs.index((a, b)) == i else 0.0 for i, (a, b) in enumerate(pairs)]


def nic_pair(connection: int, most: int, dialler: int, listener: int) -> tuple[int, int]:
    """Returns (NIC of the connecting rank, NIC of the other) of one of `most` ** 2 connections.

    Each pair has one connection or more.

    Args:
        most: the largest number of NICs of any host.
        dialler, listener: how many NICs the hosts of the two ends have.
    """
    return connection // most % dialler, connection % most % listener
