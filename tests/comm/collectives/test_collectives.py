"""Collectives of uneven owners: right sums, the same bits everywhere, predicted bytes, errors instead of hangs."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from heteromesh.comm.collectives.gloo import GlooTransport
from heteromesh.comm.collectives.uneven import UnevenCollectives, open_collectives
from heteromesh.planner.reduction.reduction import Reduction, plan_reduction
from ranks import World, run_ranks
from reduction_bytes import sent_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SIZES = (0, 1, 7, 4096, 150_001)


def made(weights, hosts, waves=()) -> Reduction:
    fractions = tuple(w / sum(weights) for w in weights)
    return Reduction(
        hosts=tuple(hosts),
        fractions=fractions,
        seconds_per_byte=1e-8,
        bound_seconds_per_byte=1e-8,
        ring_seconds_per_byte=9e-8,
        waves=waves,
    )


def values(rank: int, numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)


def expected(reduction: Reduction, numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Hosts in order, ranks of a host in order, in fp32 at least, rounded once: the exact bits."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    hosts: dict[int, torch.Tensor] = {}
    for rank, host in enumerate(reduction.hosts):
        part = values(rank, numel, dtype, seed).to(wide)
        hosts[host] = hosts[host] + part if host in hosts else part
    total = hosts.pop(min(hosts))
    for host in sorted(hosts):
        total = total + hosts[host]
    return total.to(dtype)


def sums(world: World, weights, hosts) -> None:
    reduction = made(weights, hosts)
    collectives = UnevenCollectives(GlooTransport(world.gradients), reduction)
    predicted = 0
    ranks = frozenset(range(world.size))
    for dtype in DTYPES:
        wide = 4 if dtype == torch.bfloat16 else None
        for numel in SIZES:
            case = (numel, dtype.itemsize)
            bounds = collectives.bounds(numel)
            own = slice(bounds[world.rank], bounds[world.rank + 1])
            right = expected(reduction, numel, dtype)

            flat = values(world.rank, numel, dtype)
            collectives.all_reduce(flat).wait()
            assert torch.equal(flat, right)
            predicted += sent_bytes(reduction, *case, sources=ranks, spread=True, wide=wide)[world.rank]

            flat = values(world.rank, numel, dtype)
            collectives.reduce_scatter(flat).wait()
            assert torch.equal(flat[own], right[own])
            predicted += sent_bytes(reduction, *case, sources=ranks, spread=False, wide=wide)[world.rank]

            # what others own is poison here, and must never come out
            shards = torch.full((numel,), torch.nan, dtype=dtype)
            shards[own] = flat[own]
            collectives.all_gather(shards).wait()
            assert torch.equal(shards, right)
            predicted += sent_bytes(reduction, *case, sources=None, spread=True)[world.rank]

            for takers in ({0}, set(range(world.size // 2, world.size))):
                shards = torch.full((numel,), torch.nan, dtype=dtype)
                shards[own] = flat[own]
                collectives.all_gather(shards, takers).wait()
                assert torch.equal(shards[own], right[own])
                others = torch.cat((shards[: own.start], shards[own.stop :]))
                assert torch.equal(shards, right) if world.rank in takers else bool(others.isnan().all())
                predicted += sent_bytes(reduction, *case, sources=None, spread=True, receivers=takers)[world.rank]
    assert collectives.sent_bytes == predicted
    collectives.close()


@pytest.mark.parametrize(
    ("weights", "hosts"),
    [
        ((1.0,), (0,)),
        ((0.3, 0.7), (0, 1)),
        ((0.61, 0.0, 0.39), (0, 1, 2)),
        ((5, 5, 0, 1), (0, 1, 2, 3)),
        ((1, 2, 0, 3), (0, 0, 1, 1)),
        ((0, 1, 0, 0), (0, 1, 0, 2)),
        ((1, 0, 2), (0, 0, 0)),
    ],
)
def test_every_collective_with_uneven_owners(weights, hosts) -> None:
    if len(weights) == 1:
        sums(World(gradients=_Alone()), weights, hosts)  # type: ignore[arg-type]
    else:
        run_ranks(len(weights), sums, weights, hosts)


class _Alone:
    """A process group of one: nothing may be sent."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def interleaved(world: World) -> None:
    reduction = made((3, 1, 0, 2), (0, 1, 2, 2), waves=(1, 0, 0, 1))
    collectives = UnevenCollectives(GlooTransport(world.gradients), reduction)
    sizes = [150_000, 3, 40_000, 0, 300_000, 1000]
    for turn in range(3):
        flats = [values(world.rank, n, torch.float32, turn * 10 + i) for i, n in enumerate(sizes)]
        gathered = torch.full((50_000,), torch.nan)
        low, high = collectives.bounds(50_000)[world.rank : world.rank + 2]
        gathered[low:high] = world.rank
        handles = [collectives.all_reduce(flat) for flat in flats[:3]]
        handles.append(collectives.all_gather(gathered))
        handles += [collectives.all_reduce(flat) for flat in flats[3:]]
        for handle in reversed(handles):  # the order of the waits is free
            handle.wait()
            handle.wait()
        for i, flat in enumerate(flats):
            assert torch.equal(flat, expected(reduction, sizes[i], torch.float32, turn * 10 + i))
        bounds = collectives.bounds(50_000)
        assert all((gathered[bounds[r] : bounds[r + 1]] == r).all() for r in range(world.size))
    collectives.close()


def test_several_collectives_under_way_at_once() -> None:
    run_ranks(4, interleaved)


def ring(world: World) -> tuple[list[int], int, int]:
    collectives = open_collectives(world.gradients, plan_reduction(range(world.size), [1e9] * world.size, [1e9] * 4))
    flat = values(world.rank, 100_003, torch.float32)
    collectives.all_reduce(flat).wait()
    by_ring = collectives.sent_bytes
    half = values(world.rank, 1003, torch.bfloat16)
    collectives.all_reduce(half).wait()
    assert torch.equal(half, expected(collectives.reduction, 1003, torch.bfloat16))
    collectives.close()
    right = sum(values(r, 100_003, torch.float32).double() for r in range(world.size))
    assert torch.allclose(flat.double(), right, rtol=1e-5, atol=1e-5)
    return flat.view(torch.int32).tolist(), by_ring, collectives.sent_bytes


def test_equal_hosts_use_gloos_ring_but_for_bf16() -> None:
    results = run_ranks(3, ring)
    assert all(bits == results[0][0] for bits, _, _ in results)
    ring_bytes = 2 * 4 * 100_003 * 2 // 3
    assert all(by_ring == ring_bytes < all_of_it for _, by_ring, all_of_it in results)


def refused(world: World) -> None:
    collectives = open_collectives(world.gradients, made((1, 1), (0, 1)))
    with pytest.raises(ValueError, match="must be contiguous"):
        collectives.all_reduce(torch.zeros(4, 4).t())
    with pytest.raises(ValueError, match="on the CPU"):
        collectives.all_gather(torch.zeros(4, device="meta"))
    with pytest.raises(ValueError, match="a reduction over 3 ranks on a transport of 2"):
        open_collectives(world.gradients, made((1, 1, 1), (0, 1, 2)))
    flat = torch.ones(2, 3)  # a refusal leaves nothing behind
    collectives.all_reduce(flat).wait()
    assert torch.equal(flat, torch.full((2, 3), 2.0))
    collectives.close()


def test_bad_tensors_are_refused_before_anything_is_sent() -> None:
    run_ranks(2, refused)


def deserted(world: World) -> float:
    group = dist.new_group(timeout=timedelta(seconds=2))
    collectives = UnevenCollectives(GlooTransport(group), made((1, 1, 0), (0, 1, 2)))
    if world.rank == 1:
        world.barrier()
        return 0.0
    start = time.monotonic()
    handle = collectives.all_reduce(torch.ones(500_000))
    with pytest.raises(RuntimeError):
        handle.wait()
    with pytest.raises(RuntimeError):
        handle.wait()
    with pytest.raises(RuntimeError, match="an earlier collective failed"):
        collectives.all_reduce(torch.ones(3))
    collectives.close()
    took = time.monotonic() - start
    world.barrier()
    return took


def test_a_rank_that_does_not_come_ends_in_an_error_within_the_time_limit() -> None:
    assert max(run_ranks(3, deserted)) < 15


class _Broken:
    """A transport whose messages fail."""

    rank, size = 0, 2

    def send(self, peer: int, tensor: torch.Tensor, tag: int) -> _Broken:
        return self

    recv = send

    def wait(self) -> None:
        raise ConnectionError("gone")

    def close(self) -> None: ...


def test_what_went_wrong_in_a_thread_is_raised_by_wait() -> None:
    collectives = UnevenCollectives(_Broken(), made((1, 1), (0, 1)))
    handle = collectives.all_reduce(torch.ones(10))
    with pytest.raises(ConnectionError, match="gone"):
        handle.wait()
    collectives.close()
