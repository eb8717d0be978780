"""int8 gradient sums: what rounding costs, that nothing is lost, and that training converges all the same."""

import math
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from heteromesh.comm.collectives.gloo import GlooTransport
from heteromesh.comm.collectives.int8 import BLOCK, Int8Collectives, dequantise, quantise, seconds_per_value
from heteromesh.comm.collectives.torch import TorchCollectives
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.parallel.state.owner import Replicated
from heteromesh.parallel.state.sharded import Sharded
from heteromesh.planner.reduction.compression import seconds_saved
from heteromesh.planner.reduction.reduction import Reduction, plan_reduction
from ranks import World, run_ranks

SHARES = (0.6, 0.0, 0.4)


def quantised(world: World) -> Int8Collectives:
    assert world.gradients
    return Int8Collectives(TorchCollectives(world.gradients, SHARES), GlooTransport(world.gradients))


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
def test_no_value_is_off_by_more_than_half_a_level(count: int) -> None:
    torch.manual_seed(count)
    values = torch.randn(count) * torch.logspace(-3, 3, max(count, 1))[:count]
    payload = quantise(values)
    assert payload.nbytes == count + 4 * math.ceil(count / BLOCK)
    found = dequantise(payload, torch.empty(count))
    for mine, true in zip(found.split(BLOCK), values.split(BLOCK), strict=True):
        if len(true):
            assert float((mine - true).abs().max()) <= float(true.abs().max()) / 254 * 1.0001
    assert torch.equal(dequantise(quantise(torch.zeros(count)), torch.ones(count)), torch.zeros(count))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_with_a_bad_value_is_not_a_number(bad: float) -> None:
    values = torch.ones(2 * BLOCK)
    values[3] = bad
    found = dequantise(quantise(values), torch.empty(2 * BLOCK))
    assert not found[:BLOCK].isfinite().any()
    assert torch.equal(found[BLOCK:], torch.ones(BLOCK))


def sums(world: World) -> None:
    size, count = world.size, 5 * BLOCK + 11
    low, high = TorchCollectives(world.gradients, SHARES).bounds(count)[world.rank :][:2]

    def mine(rank: int, step: int) -> torch.Tensor:
        return torch.randn(count, generator=torch.Generator().manual_seed(10 * step + rank))

    with closing(quantised(world)) as compression:
        applied, true = torch.zeros(count), torch.zeros(count)
        for step in range(50):
            flat = mine(world.rank, step)
            compression.all_reduce(flat, 0).wait()
            compression.commit()
            rows = world.gather(flat.numpy().tobytes())
            assert all(row == rows[0] for row in rows), "the same bits everywhere"
            applied += flat
            true += sum(mine(rank, step) for rank in range(size))
            # what rounding took away comes later: the difference never grows with the steps
            assert float((applied - true).abs().max()) < 0.2
        flat = mine(world.rank, 0)
        compression.reduce_scatter(flat, 1).wait()
        expected = sum(mine(rank, 0) for rank in range(size))
        assert torch.allclose(flat[low:high], expected[low:high], atol=0.1)
        before = compression.sent_bytes
        flat = mine(world.rank, 0)
        flat[7] = math.nan if world.rank == 1 else 0.0
        compression.all_reduce(flat, 2).wait()
        compression.commit()
        assert not flat[7].isfinite()
        sent = (count - (high - low)) + (size - 1) * (high - low)
        assert sent <= compression.sent_bytes - before <= 1.05 * sent
        flat = mine(world.rank, 0)
        compression.all_reduce(flat, 2).wait()
        compression.commit()
        assert torch.allclose(flat, expected, atol=0.2), "no error is left of what was not finite"


def test_sums_are_equal_everywhere_and_nothing_is_lost() -> None:
    run_ranks(3, sums)


def train(world: World, compressed: bool, sharded: bool) -> tuple[list[float], bytes]:
    """Mean losses of every 20 steps of a small regression; the parameters."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    collectives = quantised(world) if compressed else TorchCollectives(world.gradients, SHARES)
    world.collectives = collectives
    exchange = GradientReducer(model.parameters(), bucket_bytes=2048, scatter=sharded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    owner: Any = Sharded(optimizer, model, exchange.buckets, world) if sharded else None
    owner = owner or Replicated(optimizer, model, exchange.buckets)
    noise, losses = torch.Generator().manual_seed(world.rank), []
    for step in range(80):
        x = torch.randn(32, 16, generator=noise)
        exchange.begin(step, world)
        with exchange.share((world.rank,), (0,)):
            exchange.last_backward()
            loss = (model(x) - teacher(x).detach()).square().mean() / world.size
            loss.backward()
        owner.apply(exchange.finish(), math.inf)
        exchange.committed()
        losses.append(float(world.sum(loss.detach().clone())))
    owner.close()
    collectives.close()
    means = [sum(losses[i : i + 20]) / 20 for i in range(0, len(losses), 20)]
    return means, b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def train_each(world: World) -> list[tuple[list[float], bytes]]:
    return [train(world, *how) for how in ((False, False), (True, False), (True, True))]


def test_training_converges_as_without() -> None:
    plain, *compressed = zip(*run_ranks(3, train_each), strict=True)
    for results in compressed:
        assert all(row == results[0] for row in results), "losses and parameters have the same bits on every rank"
        assert results[0][0] == pytest.approx(plain[0][0], rel=0.05)
    assert plain[0][0][-1] < 0.5 * plain[0][0][0]


def reduction(gbit: float) -> Reduction:
    return plan_reduction((0, 1, 2, 3), [gbit * 1e9 / 8] * 4, [1e10] * 4)


def test_int8_is_chosen_where_it_pays() -> None:
    values, fast = 30_000_000, 1e-9
    slow = seconds_saved(reduction(0.2), values=values, seconds_per_value=fast)
    plain = 1.5 * 4 * values / (0.2e9 / 8)
    assert 0.7 * plain < slow < 0.75 * plain, "three quarters of the bytes, less the work"
    assert seconds_saved(reduction(100), values=values, seconds_per_value=fast) < 0, "the work costs more"
    assert seconds_saved(reduction(0.2), values=values, seconds_per_value=1e-6) < 0, "a slow processor"
    hidden = seconds_saved(reduction(0.2), values=values, seconds_per_value=fast, hidden_seconds=2 * plain)
    assert hidden < 0, "what backward hides needs no saving"


def test_the_processor_is_measured() -> None:
    assert 1e-11 < seconds_per_value(1 << 14) < 1e-5
