"""The rate of every network card by plain TCP connections that are bound to it, where a host has several."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from heteromesh.comm.world import World
from heteromesh.runtime.network.interfaces import Interface
from heteromesh.runtime.network.tournament import tournament

SECONDS = 0.4
CHUNK = 1 << 18
CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRate:
    """The most that one card was seen to carry."""

    host: int
    interface: str
    out: float
    """Bytes per second."""
    into: float


def measure_cards(world: World, hosts: Sequence[Sequence[int]], cards: Sequence[Sequence[Interface]]) -> list[CardRate]:
    """Rates of all cards of all hosts. cards: by host. Every rank of the world must call it; all get the same.

    In each round two hosts use one card each; the pairs of a round are at work together. Cards meet where they are
    on one network.
    """
    leaders = [ranks[0] for ranks in hosts]
    me = leaders.index(world.rank) if world.rank in leaders else None
    best: dict[tuple[int, str], tuple[float, float]] = {}
    for turn in tournament(len(hosts)):
        for slot in range(max(len(_links(cards, pair)) for pair in turn)):
            mine = next((p for p in turn if me in p), None)
            links = _links(cards, mine) if mine else []
            link = links[slot] if slot < len(links) else None
            for forward in (True, False):
                rate = _one_way(world, me, mine, link, forward)
                for entry in world.gather(rate):
                    for host, name, sent, received in entry:
                        out, into = best.get((host, name), (0.0, 0.0))
                        best[host, name] = max(out, sent), max(into, received)
    return [CardRate(host=h, interface=name, out=o, into=i) for (h, name), (o, i) in sorted(best.items())]


def _links(cards: Sequence[Sequence[Interface]], pair: tuple[int, int]) -> list[tuple[Interface, Interface]]:
    """The cards of two hosts that are on one network."""
    return [(a, b) for a in cards[pair[0]] for b in cards[pair[1]] if a.network == b.network]


def _one_way(
    world: World,
    me: int | None,
    pair: tuple[int, int] | None,
    link: tuple[Interface, Interface] | None,
    forward: bool,
) -> list[tuple[int, str, float, float]]:
    """[(host, card, bytes per second sent, received)] of both ends, from the receiving one."""
    receives = pair is not None and link is not None and me == pair[forward]
    sends = pair is not None and link is not None and me == pair[not forward]
    listener, port = None, 0
    if receives and link:
        listener = socket.create_server((link[forward].address, 0))
        listener.settimeout(CONNECT_SECONDS)
        port = listener.getsockname()[1]
    ports = world.gather((me, port))
    count = 0.0
    if listener:
        count = _receive(listener)
    elif sends and pair and link:
        target = next(p for host, p in ports if host == pair[forward] and p)
        _send(link[not forward], (link[forward].address, target))
    if not (receives and count and pair and link):
        return []
    return [(pair[not forward], link[not forward].name, count, 0.0), (pair[forward], link[forward].name, 0.0, count)]


def _send(card: Interface, target: tuple[str, int]) -> None:
    """Sends zeros through this card as fast as it takes them."""
    with socket.socket() as sender, suppress(OSError):
        with suppress(OSError):  # needs a privilege; without it the route decides, which the address settles mostly
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, card.name.encode())
        sender.bind((card.address, 0))
        sender.settimeout(CONNECT_SECONDS)
        sender.connect(target)
        data, end = bytes(CHUNK), time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            sender.sendall(data)


def _receive(listener: socket.socket) -> float:
    """Bytes per second of one connection's second half; 0 where none came."""
    seen: list[tuple[float, int]] = []
    with listener, suppress(OSError):
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(CONNECT_SECONDS)
            buffer, total = bytearray(CHUNK), 0
            while count := stream.recv_into(buffer):
                total += count
                seen.append((time.perf_counter(), total))
    if len(seen) < 2:
        return 0.0
    middle = next(entry for entry in seen if entry[0] >= (seen[0][0] + seen[-1][0]) / 2)
    elapsed = seen[-1][0] - middle[0]
    return (seen[-1][1] - middle[1]) / elapsed if elapsed else 0.0
