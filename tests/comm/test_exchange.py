"""Messages among some ranks: who gets what, and what is refused before anything is sent."""

from __future__ import annotations

import pytest
import torch

from heteromesh.comm.exchange import Exchange
from ranks import World, run_ranks


def trade(world: World) -> None:
    exchange = Exchange(world, range(world.size))
    me, size = exchange.member, world.size
    # member i sends i + j numbers to member j: sizes differ, and some are zero
    sends = [torch.full((me + j,), 10.0 * me + j) for j in range(size)]
    receives = [torch.empty(i + me) for i in range(size)]
    exchange.all_to_all(sends, receives, "trade")
    for i, got in enumerate(receives):
        assert torch.equal(got, torch.full((i + me,), 10.0 * i + me))
    assert world.recorder.sent_bytes == sum(4 * (me + j) for j in range(size) if j != me)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_to_all(size: int) -> None:
    run_ranks(size, trade)


def order(world: World) -> None:
    exchange = Exchange(world, (0, 1))
    peer = 1 - exchange.member
    first, second = torch.empty(3), torch.empty(3)
    transfers = [
        exchange.start([(peer, torch.full((3,), float(n)))], [(peer, out)], "order")
        for n, out in ((1, first), (2, second))
    ]
    for transfer in reversed(transfers):
        transfer.wait()
    assert (first[0], second[0]) == (1.0, 2.0)
    with pytest.raises(RuntimeError, match="waited for already"):
        transfers[0].wait()


def test_messages_keep_their_order_and_are_waited_for_once() -> None:
    run_ranks(2, order)


def some(world: World) -> None:
    if world.rank == 1:
        with pytest.raises(ValueError, match=r"rank 1 is not one of the pass's ranks \(0, 2, 3\)"):
            Exchange(world, (0, 2, 3))
        return
    pair = Exchange(world, (0, 2, 3))
    if world.rank != 0:
        pair = pair.among([2, 1])
        assert pair.ranks == (3, 2)
        got = torch.empty(1)
        pair.start([(1 - pair.member, torch.tensor([float(world.rank)]))], [(1 - pair.member, got)], "pair").wait()
        assert got[0] == 5 - world.rank


def test_any_set_of_ranks_may_exchange() -> None:
    run_ranks(4, some)


@pytest.mark.parametrize(
    ("sends", "receives", "rule"),
    [
        ([(0, torch.zeros(2))], [], "no peer of member 0"),
        ([], [(2, torch.zeros(2))], "member 2 is no peer"),
        ([(-1, torch.zeros(2))], [], "member -1 is no peer"),
        ([(1, torch.zeros(4)[::2])], [], "contiguous"),
        ([(1, torch.zeros(2, device="meta"))], [], "must be on cpu"),
    ],
)
def test_misuse_of_start(sends: list, receives: list, rule: str) -> None:
    world = World(size=2)
    with pytest.raises(ValueError, match=rule):
        Exchange(world, (0, 1)).start(sends, receives, "test")
    assert world.recorder.sent_bytes == 0


@pytest.mark.parametrize(
    ("sends", "receives", "rule"),
    [
        ([torch.zeros(1)], [torch.zeros(1)] * 2, "1 sends and 2 receives for 2 members"),
        ([torch.zeros(4)[::2]] * 2, [torch.zeros(2)] * 2, "contiguous"),
    ],
)
def test_misuse_of_all_to_all(sends: list, receives: list, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Exchange(World(size=2), (0, 1)).all_to_all(sends, receives, "test")
