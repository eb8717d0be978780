"""Gradient sums over the abortable TCP transport: an epoch that ends in the middle of them changes no bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from mesh import everywhere, mesh
from shares import Branches, Reducer, check, work

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.collectives.direct import DirectCollectives
from heteromesh.comm.collectives.int8 import ErrorFeedback, Int8Collectives
from heteromesh.comm.collectives.uneven import UnevenCollectives
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.planner.reduction.reduction import plan_reduction

SIZE = 3


class Members:
    """Three members in one process, with the epochs of three steps."""

    def __init__(self, owners: str, int8: bool) -> None:
        self._owners, self._int8 = owners, int8
        self.models = [Branches() for _ in range(SIZE)]
        self.errors = [ErrorFeedback() for _ in range(SIZE)]
        self.reducers = [Reducer(model, keep=True, bucket_bytes=64) for model in self.models]

    @contextmanager
    def epoch(self) -> Iterator[tuple[list[World], Any]]:
        with mesh(SIZE) as (transports, pool):
            worlds = []
            for transport, errors in zip(transports, self.errors, strict=True):
                collectives: Collectives = DirectCollectives(transport)
                if self._owners == "uneven":
                    collectives = UnevenCollectives(transport, plan_reduction((0, 1, 1), [1e8, 3e8], [1e9, 1e9]))
                if self._int8:
                    collectives = Int8Collectives(collectives, transport, errors)
                worlds.append(World(rank=transport.rank, size=SIZE, exchange=transport, collectives=collectives))
            try:
                yield worlds, pool
            finally:
                for world in worlds:
                    world.exchange.close()  # type: ignore[union-attr]
                    world.collectives.close()  # type: ignore[union-attr]

    def lose(self, step: int) -> None:
        """An attempt in which rank 2 leaves when the others have started all their sums."""
        started = threading.Barrier(SIZE)

        def act(world: World) -> None:
            reducer = self.reducers[world.rank]
            reducer.begin(step, world)
            work(reducer, self.models[world.rank], [((world.rank,), 3 * world.rank + step)], last=world.rank < 2)
            if world.rank < 2:
                reducer.flush()
            started.wait(150)
            if world.rank == 2:
                world.exchange.close()  # type: ignore[union-attr]
                return
            with pytest.raises(GroupAborted):
                reducer.finish()

        with self.epoch() as (worlds, pool):
            everywhere(pool, act, worlds)

    def step(self, step: int) -> list[Summed]:
        def act(world: World) -> Summed:
            reducer = self.reducers[world.rank]
            reducer.begin(step, world)
            if not reducer.held():
                work(reducer, self.models[world.rank], [((world.rank,), 3 * world.rank + step)])
            summed = reducer.finish()
            if world.rank == 0 and not self._int8:
                names = {operation.name for operation in world.exchange.records.operations()}  # type: ignore[union-attr]
                assert names == {"all_reduce"}, "the diagnosis sees the sums"
            tensors = tuple(tensor.clone() for tensor in summed.tensors)
            reducer.committed()
            return replace(summed, tensors=tensors)

        with self.epoch() as (worlds, pool):
            found = everywhere(pool, act, worlds)
        for summed, reducer in zip(found, self.reducers, strict=True):
            if not self._int8:
                check(summed, reducer, [3 * rank + step for rank in range(SIZE)])
        return found


@pytest.mark.parametrize("owners", ["direct", "uneven"])
@pytest.mark.parametrize("int8", [False, True])
def test_an_epoch_that_ends_changes_no_bit(owners: str, int8: bool) -> None:
    calm, shaken = Members(owners, int8), Members(owners, int8)
    for step in range(3):
        if step:
            shaken.lose(step)
        one, other = calm.step(step), shaken.step(step)
        assert len({summed.digest for summed in (*one, *other)}) == 1
        for mine, theirs in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.tensors, theirs.tensors, strict=True))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 50_000])
def test_direct_sums_in_place_with_uneven_owners(size: int, count: int) -> None:
    values = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    total = values[0].clone()
    for value in values[1:]:
        total += value
    with mesh(size) as (transports, pool):

        def act(transport: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            with closing(DirectCollectives(transport, [float(rank) for rank in range(size)])) as collectives:
                whole, part = values[transport.rank].clone(), values[transport.rank].clone()
                for pending in [collectives.all_reduce(whole), collectives.reduce_scatter(part)]:
                    pending.wait()
                low, high = collectives.bounds(count)[transport.rank :][:2]
                gathered = torch.full((count,), torch.nan)
                gathered[low:high] = part[low:high]
                collectives.all_gather(gathered).wait()
                before, some = collectives.sent_bytes, torch.zeros(count)
                some[low:high] = part[low:high]
                collectives.all_gather(some, {0}).wait()
                assert collectives.sent_bytes - before == 4 * (high - low) * (transport.rank > 0)
                assert torch.equal(
                    some,
                    total
                    if transport.rank == 0
                    else some.new_zeros(count).index_copy_(0, torch.arange(low, high), part[low:high]),
                )
                return whole, part[low:high], gathered

        results = everywhere(pool, act, transports)
    for whole, _, gathered in results:
        assert torch.equal(whole, total), "in rank order, so the very bits"
        assert torch.equal(gathered, total)
    assert sum(part.numel() for _, part, _ in results) == count


def test_int8_errors_stay_with_a_tensor_whose_owners_change() -> None:
    """What rounding takes away under one set of owners comes later under another, and is never lost."""
    count, errors = 5000, [ErrorFeedback() for _ in range(SIZE)]
    values = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(SIZE)]
    true, applied = torch.zeros(count), torch.zeros(count)
    for epoch, shares in enumerate([(1.0, 1.0, 1.0), (0.0, 1.0, 3.0), (2.0, 1.0, 0.0)] * 5):
        with mesh(SIZE) as (transports, pool):

            def act(transport: Any, shares: tuple[float, ...] = shares, epoch: int = epoch) -> torch.Tensor:
                inner = DirectCollectives(transport, shares)
                with closing(Int8Collectives(inner, transport, errors[transport.rank])) as collectives:
                    flat = values[transport.rank].clone()
                    if epoch % 4 == 3:
                        low, high = collectives.bounds(count)[transport.rank :][:2]
                        collectives.reduce_scatter(flat, 0).wait()
                        collectives.commit()
                        part = torch.zeros(count)
                        part[low:high] = flat[low:high]
                        return part
                    collectives.all_reduce(flat, 0).wait()
                    collectives.commit()
                    return flat

            sums = everywhere(pool, act, transports)
        applied += sum(sums) if epoch % 4 == 3 else sums[0]
        true += sum(values)
        assert float((applied - true).abs().max()) < 0.2, "never grows with the steps"
