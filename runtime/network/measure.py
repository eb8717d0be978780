"""Every link of the cluster: between ranks of a host, between hosts, and all hosts at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.comm.world import World
from heteromesh.planner.cluster.links import Links
from heteromesh.runtime.network.fit import AlphaBeta
from heteromesh.runtime.network.pairs import WAYS, Pair, PairReading, Way
from heteromesh.runtime.network.tournament import tournament

FAN_SECONDS = 0.3
"""Of a host's sends to all others, where its own card is what limits them."""
LEAST_SECONDS = 0.05
"""Of one of them."""
FASTER = 1.15
NEAR = 1.3
TURNS = 7
"""Hosts that each host exchanges with where time is short."""

Ranks = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPair:
    """The link between two hosts (a < b), all their ranks at work, other pairs too."""

    hosts: tuple[int, int]
    latency: float
    forward: float
    """Bytes per second from a to b while nothing goes back."""
    backward: float
    both: float
    """Bytes per second each way when both send at once."""
    line: AlphaBeta
    """Fit of `both` between the first ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPair:
    """The link between two ranks of a host, other pairs of all hosts at work too."""

    ranks: tuple[int, int]
    latency: float
    both: float
    """Bytes per second each way when both send at once."""
    line: AlphaBeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Everything measured about links, equal on every rank."""

    hosts: tuple[tuple[int, ...], ...]
    """Per host, its ranks."""
    local: tuple[LocalPair, ...]
    between: tuple[HostPair, ...]
    out: tuple[float, ...]
    """Per host, the most bytes per second that it sent to others; empty: one host."""
    into: tuple[float, ...]
    together: float | None
    """Rate of pairs while all pairs of a round are at work over their rate alone; None: fewer than four hosts."""


def measure_network(world: World, hosts: Sequence[Sequence[int]]) -> Network:
    """hosts: per host, its ranks. Every rank of the world must call it; all get the same."""
    ranks = tuple(tuple(h) for h in hosts)
    local = _local(world, ranks)
    if len(ranks) == 1:
        return Network(hosts=ranks, local=local, between=(), out=(), into=(), together=None)
    between = _between(world, ranks)
    out, into = (_best(len(ranks), between, ways) for ways in (_rates, _reversed))
    if len(ranks) > 2:
        out = [_settle(r, _fan(world, ranks, between, h, out=True)) for h, r in enumerate(out)]
        into = [_settle(r, _fan(world, ranks, between, h)) for h, r in enumerate(into)]
    together = _together(world, ranks, between) if len(ranks) > 3 else None
    return Network(hosts=ranks, local=local, between=between, out=tuple(out), into=tuple(into), together=together)


def measure_links(world: World, hosts: Sequence[int]) -> Links:
    """Rates inside hosts and of their cards, in about a second. hosts: of every rank, 0, 1, ...; two hosts at least.

    Neighbours of a host exchange, then hosts in turn with others, both ways at once. Every rank of the world must call
    it; all get the same.
    """
    ranks = tuple(tuple(r for r, host in enumerate(hosts) if host == h) for h in range(max(hosts) + 1))
    inside = [(own[i], own[i + 1]) for own in ranks for i in range(0, len(own) - 1, 2)]
    found: dict[int, list[float]] = {h: [] for h in range(len(ranks))}
    if inside:
        for (first, _), rate in _both_ways(world, inside).items():
            found[hosts[first]].append(rate)
    cards = [0.0] * len(ranks)
    for turn in tournament(len(ranks))[:TURNS]:
        members = {pair: list(zip(ranks[pair[0]], ranks[pair[1]], strict=False)) for pair in turn}
        rates = _both_ways(world, [p for pairs in members.values() for p in pairs])
        for pair, pairs in members.items():
            for host in pair:
                cards[host] = max(cards[host], sum(rates[p] for p in pairs))
    # a host with one rank needs no rate inside
    fastest = max(cards)
    return Links(
        hosts=tuple(hosts),
        link=tuple(statistics.median(own) if own else fastest for own in found.values()),
        fabrics=("",) * len(ranks),
        fabric_nics=tuple(cards),
        ethernet=tuple(cards),
    )


def _both_ways(world: World, pairs: Sequence[Ranks]) -> dict[Ranks, float]:
    """Bytes per second each way of disjoint pairs, side by side."""
    lines = _round(world, pairs, ("both",))[1]
    return {pair: lines[pair, "both"].bytes_per_second for pair in pairs}


def _best(hosts: int, between: Sequence[HostPair], ways: Callable[[HostPair], dict[int, float]]) -> list[float]:
    """Per host, the rate of its best pairs: both ways at once, where the one way alone is no faster."""
    both = [_typical([p.both for p in between if h in p.hosts]) for h in range(hosts)]
    one_way = [_typical([ways(p)[h] for p in between if h in p.hosts]) for h in range(hosts)]
    return [_settle(b, o) for b, o in zip(both, one_way, strict=True)]


def _typical(rates: Sequence[float]) -> float:
    """The median of those near the highest: what one card gives with peers that are no slower, without lucky trials."""
    return statistics.median(r for r in rates if r * NEAR >= max(rates))


def _settle(rate: float, other: float) -> float:
    """The better measured rate; the other only where it is better beyond noise."""
    return other if other > FASTER * rate else rate


def _rates(pair: HostPair) -> dict[int, float]:
    """By host, what it sends."""
    return {pair.hosts[0]: pair.forward, pair.hosts[1]: pair.backward}


def _reversed(pair: HostPair) -> dict[int, float]:
    """By host, what it receives."""
    return {pair.hosts[0]: pair.backward, pair.hosts[1]: pair.forward}


def _local(world: World, hosts: tuple[tuple[int, ...], ...]) -> tuple[LocalPair, ...]:
    found: list[LocalPair] = []
    schedules = [tournament(len(ranks)) for ranks in hosts]
    for turn in range(max(map(len, schedules))):
        pairs = [
            (ranks[a], ranks[b])
            for ranks, rounds in zip(hosts, schedules, strict=True)
            for a, b in (rounds[turn] if turn < len(rounds) else ())
        ]
        latencies, readings = _round(world, pairs, ("both",))
        found += [
            LocalPair(
                ranks=ranks,
                latency=latencies[ranks],
                both=readings[ranks, "both"].bytes_per_second,
                line=readings[ranks, "both"],
            )
            for ranks in pairs
        ]
    return tuple(sorted(found, key=lambda p: p.ranks))


def _between(world: World, hosts: tuple[tuple[int, ...], ...]) -> tuple[HostPair, ...]:
    found: list[HostPair] = []
    for turn in tournament(len(hosts)):
        members = {pair: list(zip(hosts[pair[0]], hosts[pair[1]], strict=False)) for pair in turn}
        latencies, readings = _round(world, [p for pairs in members.values() for p in pairs], WAYS)
        for hosts_of_pair, pairs in members.items():
            rate = {way: sum(readings[p, way].bytes_per_second for p in pairs) for way in WAYS}
            found.append(
                HostPair(
                    hosts=hosts_of_pair,
                    latency=latencies[pairs[0]],
                    **{way: rate[way] for way in WAYS},
                    line=readings[pairs[0], "both"],
                )
            )
    return tuple(sorted(found, key=lambda p: p.hosts))


def _round(
    world: World, pairs: Sequence[Ranks], ways: Sequence[Way]
) -> tuple[dict[Ranks, float], dict[tuple[Ranks, Way], AlphaBeta]]:
    """Disjoint pairs of ranks measure side by side; (latencies, lines) of all of them, on every rank."""
    mine = next((p for p in pairs if world.rank in p), None)
    pair = Pair(world, mine) if mine else None
    world.barrier()
    latency = pair.latency() if pair else None
    readings: list[PairReading] = []
    for way in ways:
        world.barrier()
        reading = pair.rate(way) if pair else None
        if reading:
            readings.append(reading)
    latencies, lines = {}, {}
    for ranks, seconds, lists in world.gather((mine, latency, readings)):
        if seconds is not None:
            latencies[ranks] = seconds
        for r in lists:
            lines[r.ranks, r.way] = r.line
    return latencies, lines


def _fan(
    world: World, hosts: tuple[tuple[int, ...], ...], between: Sequence[HostPair], hub: int, *, out: bool = False
) -> float:
    """Bytes per second of one host's sends to (else receives from) all others at once.

    Each link gets what it would carry alone in a fixed time, so that slow peers do not hold up the end.
    """
    rates = _reversed if out else _rates
    offered = {p.hosts[0] + p.hosts[1] - hub: rates(p) for p in between if hub in p.hosts}
    each = max(LEAST_SECONDS, FAN_SECONDS / len(offered))
    bytes_of = {host: max(1, int(rate[host] * each)) for host, rate in offered.items()}
    leaders = [ranks[0] for ranks in hosts]
    seconds = 0.0
    world.barrier()
    if world.rank in leaders:
        exchange, me = Exchange(world, leaders), leaders.index(world.rank)
        parts = bytes_of if me == hub else {hub: bytes_of[me]}
        buffers = [(h, torch.zeros(n, dtype=torch.uint8, device=world.device)) for h, n in parts.items()]
        sends = out == (me == hub)
        start = time.perf_counter()
        exchange.start(buffers if sends else [], [] if sends else buffers, "probe").wait()
        world.synchronise()
        seconds = time.perf_counter() - start
    # the slowest clock decides: a send is done when the kernel has taken it, and a receiver may have begun late
    times = world.gather(seconds)
    return float(sum(bytes_of.values()) / max(times))


def _together(world: World, hosts: tuple[tuple[int, ...], ...], between: Sequence[HostPair]) -> float:
    """Total rate of the first round's pairs, all at once over one after the other."""
    measured = {p.hosts: p.both for p in between}
    alone = 0.0
    for pair in tournament(len(hosts))[0]:
        ranks = list(zip(hosts[pair[0]], hosts[pair[1]], strict=False))
        _, lines = _round(world, ranks, ("both",))
        alone += sum(lines[r, "both"].bytes_per_second for r in ranks)
    return float(sum(measured[p] for p in tournament(len(hosts))[0]) / alone)
