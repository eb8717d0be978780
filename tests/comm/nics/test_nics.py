"""Collectives over several NICs of a host: shares kept, sums right, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from nic_bytes import nic_bytes

from heteromesh.comm.collectives.uneven import UnevenCollectives
from heteromesh.comm.nics.connect import open_nics
from heteromesh.comm.nics.schedule import DeficitRoundRobin, nic_pair
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.link import Message
from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.planner.reduction.nics import nic_rates, split
from heteromesh.planner.reduction.reduction import plan_reduction, reduction_for
from ranks import World, run_ranks


def message(size: int) -> Message:
    return Message(memoryview(bytearray(size)), 0, 0)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    st.lists(st.integers(1, 100), min_size=1, max_size=60),
)
def test_connections_carry_their_shares(weights, sizes):
    shares = [w / sum(weights) for w in weights]
    scheduler, dealt, total = DeficitRoundRobin(shares), [0] * len(shares), 0
    for size in sizes:
        scheduler.put(message(size))
        for place in range(len(shares)):
            while (taken := scheduler.outbox(place).take()) is not None:
                dealt[place] += len(taken[1])
        total += size
        assert sum(dealt) == total
        for share, given_bytes in zip(shares, dealt, strict=True):
            assert abs(given_bytes - share * total) <= len(shares) * max(sizes)
            assert share or not given_bytes
    assert not scheduler


@pytest.mark.parametrize(("most", "dialler", "listener"), [(1, 1, 1), (2, 1, 2), (2, 2, 2), (3, 2, 3), (4, 3, 1)])
def test_every_pair_of_cards_has_a_connection(most, dialler, listener):
    pairs = {nic_pair(i, most, dialler, listener) for i in range(most**2)}
    assert pairs == {(a, b) for a in range(dialler) for b in range(listener)}


def two_and_one() -> Cluster:
    double = (Nic(kind="ethernet", gbit=0.2, count=2),)
    single = (Nic(kind="infiniband", gbit=100), Nic(kind="ethernet", gbit=0.4))
    hosts = [Host(name=f"h{i}", device="cpu", count=1, nics=nics) for i, nics in enumerate((double, double, single))]
    return Cluster(name="c", hosts=tuple(hosts), devices={"cpu": CATALOG["cpu"]})


def test_a_hosts_uplink_is_the_sum_of_its_cards():
    rates = nic_rates(two_and_one())
    assert [len(its) for its in rates] == [2, 2, 1]
    assert sum(rates[0]) == pytest.approx(rates[2][0])
    reduction = reduction_for(two_and_one())
    assert reduction.fractions == pytest.approx((1 / 3,) * 3)
    assert reduction.bound_seconds_per_byte == pytest.approx(1 / sum(rates[0]))


def busiest(reduction, rates, ways) -> float:
    """Seconds per byte of the busiest card of an all-reduce, each way."""
    owned = [0.0] * len(rates)
    for fraction, host in zip(reduction.fractions, reduction.hosts, strict=True):
        owned[host] += fraction
    loads: dict[tuple[int, int, bool], float] = {}
    for (i, j), fractions in ways.items():
        for a, row in enumerate(fractions):
            for b, part in enumerate(row):
                for key in ((i, a, True), (j, b, False)):
                    loads[key] = loads.get(key, 0.0) + part * (owned[i] + owned[j])
    return max(load / rates[host][card] for (host, card, _), load in loads.items() if load)


def test_the_split_reaches_what_the_sum_of_the_cards_allows_and_follows_a_slow_card():
    rates = ((1.0, 1.0), (1.5, 0.5), (2.0,))
    reduction = plan_reduction(range(3), [2.0] * 3, [1e9] * 3)
    assert busiest(reduction, rates, split(reduction, rates)) == pytest.approx(reduction.seconds_per_byte, rel=1e-3)
    slow = ((1.0, 0.25), (1.5, 0.5), (2.0,))
    known, unknown = (busiest(reduction, slow, split(reduction, r)) for r in (slow, rates))
    assert known == pytest.approx(reduction.seconds_per_byte * 2 / 1.25, rel=1e-3)
    assert known < 0.5 * unknown
    down = split(reduction, ((1.0, 0.0), (1.5, 0.5), (2.0,)))
    assert not any(sum(fractions[1]) for (i, _), fractions in down.items() if i == 0)
    with pytest.raises(UserError, match="no card that is up"):
        split(reduction, ((1.0, 1.0), (1.5, 0.5), (0.0,)))


CARDS = ((3.0, 1.0), (4.0,), (2.0, 2.0))


def sums(world: World) -> tuple[int, ...]:
    hosts = (0, 1, 2, 2)
    reduction = plan_reduction(hosts, [4.0] * 3, [1e9] * 3)
    mine = hosts[world.rank]
    addresses = [f"127.0.{mine}.{card + 1}" for card in range(len(CARDS[mine]))]
    counts = [len(rates) for rates in CARDS]
    transport = open_nics(world.gradients, addresses, hosts, counts, split(reduction, CARDS))
    collectives = UnevenCollectives(transport, reduction)

    for numel in (1, 1_000_001):
        flat = torch.full((numel,), 2.0**world.rank)
        collectives.all_reduce(flat).wait()
        assert (flat == 15).all()
    world.barrier()
    sent = nic_bytes(transport, hosts)
    collectives.close()
    world.barrier()
    transport.close()
    return sent


def test_sums_over_all_nics_as_planned():
    first, lone, *_ = run_ranks(4, sums)
    assert first[0] / sum(first) == pytest.approx(0.75, abs=0.05)
    assert len(lone) == 1


def refused(world: World) -> None:
    reduction = plan_reduction((0, 1), [1.0] * 2, [1e9] * 2)
    ways = split(reduction, ((1.0,), (1.0,)))
    with pytest.raises(UserError, match="rank 1 has 2 addresses and its host 1 NICs"):
        open_nics(world.gradients, ["127.0.0.1"] * (1 + world.rank), (0, 1), (1, 1), ways)
    with pytest.raises(UserError, match=r"rank 0 can't listen at 192\.0\.2\.1"):
        open_nics(world.gradients, ["127.0.0.1" if world.rank else "192.0.2.1"], (0, 1), (1, 1), ways)


def test_addresses_that_are_not_the_hosts_own_are_refused_on_every_rank():
    run_ranks(2, refused)


def left(world: World) -> None:
    reduction = plan_reduction((0, 1), [1.0] * 2, [1e9] * 2)
    cards = ((1.0, 1.0),) * 2
    addresses = [f"127.0.{world.rank}.{card + 1}" for card in range(2)]
    transport = open_nics(world.gradients, addresses, (0, 1), (2, 2), split(reduction, cards))
    collectives = UnevenCollectives(transport, reduction)
    if world.rank == 0:
        with pytest.raises(GroupAborted):
            collectives.all_reduce(torch.ones(2_000_000)).wait()
    else:
        transport.close()
    collectives.close()
    transport.close()
    dist.barrier(group=world.gradients)


def test_a_rank_that_leaves_ends_the_others_waits():
    run_ranks(2, left)
