"""Messages over all cards of the hosts: each takes the connection that is furthest behind its planned share."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from heteromesh.comm.tcp.abort import Abort
from heteromesh.comm.tcp.link import Link, Message, Outbox
from heteromesh.comm.tcp.transport import TcpTransport, _Peer
from heteromesh.planner.cluster.nics import Split

_WHOLE = 1 << 31
"""Messages are not cut: collectives send pieces already."""


class _Lane(Outbox):
    """What waits for one connection."""

    def drain(self) -> list[Message]:
        messages = list(self._queue)
        self._queue.clear()
        return messages


class Lanes(Outbox):
    """Messages to one peer, dealt out to its connections by deficit round robin.

    Every message earns each connection its share of the bytes as credit, and the one with the most credit takes the
    message: after any number of messages a connection is at most one message per connection off its share.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__(0, _WHOLE)
        self._shares = tuple(shares)
        self._credit = [0.0] * len(shares)
        self._lanes = [_Lane(0, _WHOLE) for _ in shares]
        self.dealt = [0] * len(shares)
        """Bytes given to each connection."""

    def __bool__(self) -> bool:
        return any(self._lanes)

    def __getitem__(self, connection: int) -> Outbox:
        return self._lanes[connection]

    def put(self, message: Message) -> None:
        size = len(message.view)
        self._credit = [c + share * size for c, share in zip(self._credit, self._shares, strict=True)]
        chosen = max((i for i, share in enumerate(self._shares) if share), key=self._credit.__getitem__)
        self._credit[chosen] -= size
        self.dealt[chosen] += size
        self._lanes[chosen].put(message)

    def deal(self, shares: Sequence[float]) -> None:
        """New shares, also for what waits; what a connection has begun stays on it."""
        waiting = [lane.drain() for lane in self._lanes]
        self._shares, self._credit = tuple(shares), [0.0] * len(shares)
        for i, messages in enumerate(waiting):
            self.dealt[i] -= sum(len(message.view) for message in messages)
        for message in (m for messages in waiting for m in messages):
            self.put(message)


class NicTransport(TcpTransport):
    """A `TcpTransport` with a connection for every pair of cards of two hosts; `comm/nics/connect.py` makes it.

    Which connections carry how much is this end's choice alone: the frames say where their bytes belong.
    """

    def __init__(
        self,
        *,
        rank: int,
        sockets: Mapping[int, Sequence[socket.socket]],
        abort: Abort,
        hosts: Sequence[int],
        cards: Sequence[int],
        split: Split,
    ) -> None:
        """`hosts`: per rank, its host; `cards`: per host, how many it has; `sockets`: in the order of `card_pair`."""
        super().__init__(rank=rank, size=len(hosts), epoch=0, sockets=sockets, abort=abort)
        self._hosts, self._cards = tuple(hosts), tuple(cards)
        self._lanes = {peer: Lanes(self._shares(peer, split)) for peer in sockets}
        self._places: dict[int, int] = {}
        for peer, lanes in self._lanes.items():
            self._peers[peer].outbox = lanes
            self._places.update({link.fd: i for i, link in enumerate(self._peers[peer].links)})

    def reroute(self, split: Split) -> None:
        """From now on by these fractions, also what waits. Each rank may call it at any time."""
        with self._guarded():
            for peer, lanes in self._lanes.items():
                lanes.deal(self._shares(peer, split))
                end = self._peers[peer]
                for link in end.links:
                    if link.fd not in self._writing and not link.ended:
                        self._flush(link, end)

    def card_bytes(self) -> tuple[int, ...]:
        """Bytes given to each card of this host for others, so far."""
        sent = [0] * self._cards[self._hosts[self.rank]]
        for peer, lanes in self._lanes.items():
            if self._hosts[peer] != self._hosts[self.rank]:
                for i, size in enumerate(lanes.dealt):
                    sent[self._pair(peer, i)[0]] += size
        return tuple(sent)

    def _pair(self, peer: int, connection: int) -> tuple[int, int]:
        """(card here, card there)."""
        mine, theirs = self._hosts[self.rank], self._hosts[peer]
        most = max(self._cards)
        if self.rank > peer:
            return card_pair(connection, most, self._cards[mine], self._cards[theirs])
        there, here = card_pair(connection, most, self._cards[theirs], self._cards[mine])
        return here, there

    def _shares(self, peer: int, split: Split) -> list[float]:
        mine, theirs = self._hosts[self.rank], self._hosts[peer]
        count = max(self._cards) ** 2
        if mine == theirs:
            return [1.0] + [0.0] * (count - 1)
        pairs = [self._pair(peer, i) for i in range(count)]
        fractions = split[mine, theirs]
        # with fewer cards on a host than on another, several connections join the same two cards: one carries all
        return [fractions[a][b] if pairs.index((a, b)) == i else 0.0 for i, (a, b) in enumerate(pairs)]

    def _outbox(self, link: Link, end: _Peer) -> Outbox:
        return self._lanes[link.peer][self._places[link.fd]]


def card_pair(connection: int, most: int, dialler: int, listener: int) -> tuple[int, int]:
    """(card of the connecting rank, card of the other) of one of `most` ** 2 connections; each pair has one or more.

    Args:
        most: the largest number of cards of any host.
        dialler, listener: how many cards the hosts of the two ends have.
    """
    return connection // most % dialler, connection % most % listener
