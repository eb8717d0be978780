"""The gradient exchange: sums of unequal passes, shares of members that may be lost, attempts repeated bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shares import Branches, Reducer, check, work
from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.collectives.gloo import GlooTransport
from heteromesh.comm.collectives.uneven import UnevenCollectives
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.interfaces import OnceWork, Work
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World as OwnWorld
from heteromesh.errors import UserError
from heteromesh.planner.reduction.reduction import Reduction
from ranks import World, run_ranks


def uneven(world: World) -> UnevenCollectives:
    shares = [float(rank) for rank in range(world.size)]
    reduction = Reduction(
        hosts=tuple(range(world.size)),
        fractions=tuple(share / sum(shares) for share in shares),
        seconds_per_byte=0.0,
        bound_seconds_per_byte=0.0,
        ring_seconds_per_byte=1.0,
    )
    return UnevenCollectives(GlooTransport(world.gradients), reduction)


def steps(world: World, owners: bool, keep: bool, scatter: bool, bucket_bytes: int) -> list[str]:
    """Rank r runs r passes, so rank 0 none; three steps."""
    model = Branches()
    model.words.sparse = not scatter
    collectives = world.collectives = uneven(world) if owners else world.collectives
    assert collectives is not None
    reducer = Reducer(model, keep=keep, scatter=scatter, bucket_bytes=bucket_bytes)
    digests = []
    for step in range(3):
        reducer.begin(step, world)
        work(reducer, model, [((world.rank,), 10 * world.rank + i + step) for i in range(world.rank)])
        reducer.flush()
        reducer.flush()
        summed = reducer.finish()
        ranges = [slice(*collectives.bounds(b.numel)[world.rank :][:2]) for b in reducer.buckets] if scatter else None
        check(summed, reducer, [10 * r + i + step for r in range(world.size) for i in range(r)], ranges)
        digests.append(summed.digest)
        reducer.committed()
    reducer.close()
    collectives.close()
    return digests


@pytest.mark.parametrize(
    ("ranks", "owners", "keep", "scatter", "bucket_bytes"),
    [
        (2, False, False, False, 1 << 20),
        (3, True, False, True, 64),
        (4, True, True, False, 64),
        (3, False, True, False, 1),
        (2, True, True, True, 64),
    ],
)
def test_sums_of_unequal_passes(ranks: int, owners: bool, keep: bool, scatter: bool, bucket_bytes: int) -> None:
    digests = run_ranks(ranks, steps, owners, keep, scatter, bucket_bytes)
    assert all(own == digests[0] for own in digests), "the same everywhere"
    assert len(set(digests[0])) == (3 if keep else 1), "another one for other sums"


def test_one_rank_copies_nothing_unless_it_keeps() -> None:
    model = Branches()
    reducer, world = Reducer(model), OwnWorld()
    reducer.begin(0, world)
    work(reducer, model, [((0,), 1), ((0,), 3)])
    summed = reducer.finish()
    reducer.settle({0: reducer.held()})
    assert summed.tensors == ()
    assert reducer.done == {1, 3}
    assert summed.present[model.a.weight]
    assert model.a.weight.grad is not None
    assert model.b.weight.grad is None
    assert not summed.present[model.b.weight]
    reducer.committed()
    reducer.begin(1, world)
    assert model.a.weight.grad is None
    reducer.close()
    keeping = Reducer(model, keep=True)
    keeping.begin(0, world)
    work(keeping, model, [((0,), 1), ((0, 5), 2), ((0,), 3)])
    check(keeping.finish(), keeping, [1, 2, 3])


def test_backwards_outside_a_share_are_nobodys() -> None:
    model = Branches()
    reducer = Reducer(model, keep=True)
    reducer.begin(0, OwnWorld())
    model(2).backward()
    model.zero_grad()
    work(reducer, model, [((0,), 1)])
    check(reducer.finish(), reducer, [1])


def test_scattered_sums_refuse_sparse_gradients() -> None:
    model = Branches()
    reducer = Reducer(model, scatter=True)
    reducer.begin(0, OwnWorld())
    with pytest.raises(UserError, match="sparse gradient, which can't be sharded"):
        work(reducer, model, [((0,), 1)])


class Logged(Collectives):
    """One of two ranks, alone; logs what is called."""

    def __init__(self, log: list[str]) -> None:
        self.rank, self.size, self.sent_bytes = 0, 2, 0
        self.log = log

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        self.log.append("facts" if key is None else f"sum {key}")
        return OnceWork(lambda: None)


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, log: list[str]) -> torch.Tensor:
        ctx.log = log
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.log.append("on to the first layer")
        return grad, None


@pytest.mark.parametrize("keep", [False, True])
def test_sums_leave_while_the_last_backward_still_runs(keep: bool) -> None:
    log: list[str] = []
    first, last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    reducer = GradientReducer([*first.parameters(), *last.parameters()], keep=keep, bucket_bytes=1)
    reducer.begin(0, OwnWorld(size=2, collectives=Logged(log)))
    for number in range(2):
        with reducer.share((0,), [number]):
            if number:
                reducer.last_backward()
            hidden = first(torch.ones(1, 8, requires_grad=True))
            last(Marked.apply(hidden, log)).sum().backward()
    assert log == ["on to the first layer", "sum 0", "on to the first layer", "sum 1"]
    reducer.finish()
    assert log[4:] == ["facts"]


class Aborting(Logged):
    """Its transport is aborted at the second sum: that one can't be started, the first one ends in the middle."""

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        if self.log:
            raise GroupAborted("gone")
        self.log.append("sum")

        def fail() -> None:
            flat.fill_(torch.nan)
            raise GroupAborted("gone in the middle")

        return OnceWork(fail)


def test_an_attempt_given_up_in_the_middle_of_its_sums_is_repeated_with_the_same_bits() -> None:
    results: list[Summed] = []
    for aborted in (False, True):
        model = Branches()
        reducer = Reducer(model, keep=True, bucket_bytes=64)
        passes: list[tuple[tuple[int, ...], int]] = [((0, 1), 2), ((0,), 1), ((0, 1), 4)]
        if aborted:
            reducer.begin(0, OwnWorld(size=2, collectives=Aborting([])))
            work(reducer, model, passes)
            with pytest.raises(GroupAborted):
                reducer.finish()
        reducer.begin(0, OwnWorld())
        if not aborted:
            work(reducer, model, passes)
        results.append(reducer.finish())
        check(results[-1], reducer, [1, 2, 4])
    assert results[0].digest == results[1].digest
    assert all(torch.equal(one, other) for one, other in zip(results[0].tensors, results[1].tensors, strict=True))


def test_an_attempt_that_is_repeated_begins_with_nothing_where_nothing_is_kept_apart() -> None:
    model = Branches()
    reducer = Reducer(model, bucket_bytes=64)
    passes: list[tuple[tuple[int, ...], int]] = [((0, 1), 2), ((0,), 1), ((0, 1), 4)]
    reducer.begin(0, OwnWorld(size=2, collectives=Aborting([])))
    work(reducer, model, passes)
    with pytest.raises(GroupAborted):
        reducer.finish()
    assert reducer.held()
    reducer.begin(0, OwnWorld(size=2, collectives=Logged([])))
    assert not reducer.held()
    assert not reducer.done
    work(reducer, model, passes[:2])
    check(reducer.finish(), reducer, [1, 2])


def test_a_pass_that_fails_drops_its_share_and_a_lost_member_its_shares() -> None:
    model = Branches()
    reducer = Reducer(model, keep=True)
    reducer.begin(7, OwnWorld())
    work(reducer, model, [((1,), 1), ((1, 2), 2), ((1, 3), 3)], last=False)

    def fail() -> None:
        with reducer.share((1, 3), [5]):
            model(5).backward()
            raise GroupAborted("gone")

    with pytest.raises(GroupAborted):
        fail()
    assert reducer.held() == {(1,): ((1,),), (1, 2): ((2,),)}
    reducer.begin(7, OwnWorld())
    reducer.settle({1: reducer.held(), 3: {(3,): [[9]], (1, 3): [[3]]}})
    assert reducer.done == {1, 9}, "2 has left with (1, 2), and 1 has dropped (1, 3)"
    work(reducer, model, [((1, 3), 4)])
    check(reducer.finish(), reducer, [1, 4])
    reducer.begin(8, OwnWorld())
    assert reducer.held() == {}
