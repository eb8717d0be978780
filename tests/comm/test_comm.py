"""Exchanges among any ranks, and the device of a rank."""

import pytest
import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.comm.world import pick_device
from heteromesh.errors import UserError
from ranks import World, run_ranks


def uneven_all_to_all(world: World) -> None:
    """Members send i + 2 * j numbers (none to begin with) to each other; two disjoint passes at once."""
    for ranks in ([0, 2], [1, 3], [0, 1, 3], [3], [0, 1, 2, 3]):
        if world.rank not in ranks:
            continue
        exchange, size = Exchange(world, ranks), len(ranks)
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            me = exchange.member
            sends = [torch.full((me + 2 * j,), 10 * me + j, dtype=dtype) for j in range(size)]
            receives = [torch.full((j + 2 * me,), -7, dtype=dtype) for j in range(size)]
            before = world.recorder.sent_bytes
            exchange.all_to_all(sends, receives, "test")
            for j in range(size):
                assert receives[j].tolist() == [10 * j + me] * (j + 2 * me)
            sent = sum(s.nbytes for j, s in enumerate(sends) if j != me)
            assert world.recorder.sent_bytes - before == sent


def test_uneven_exchanges_among_any_ranks() -> None:
    run_ranks(4, uneven_all_to_all)


def misuse(world: World) -> None:
    exchange = Exchange(world, [0])
    with pytest.raises(ValueError, match="rank 0 is not one of"):
        Exchange(world, [1, 2])
    with pytest.raises(ValueError, match="1 sends and 0 receives"):
        exchange.all_to_all([torch.zeros(1)], [], "x")
    with pytest.raises(ValueError, match="contiguous"):
        exchange.all_to_all([torch.zeros(4, 4).t()], [torch.zeros(4, 4)], "x")


def test_misuse_is_told() -> None:
    run_ranks(1, misuse)


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="local rank 1 has no CUDA device"):
        pick_device()
