"""How far an optimizer's work can be dealt out is found out by trying it, and told where it can't be."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from heteromesh.errors import UserError
from heteromesh.parallel.state.separable import check_separable
from heteromesh.planner.ownership.whole import deal_whole
from muon import Coupled, MuonAdamW

Make = Callable[[Any], torch.optim.Optimizer]


class Noisy(torch.optim.SGD):
    """Scales each step by the norm of the whole parameter's gradient, as LARS does."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad / p.grad.norm()
        super().step()


class Wrapping(torch.optim.Optimizer):
    """Made of another one, which never hears of other parameters."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.AdamW(params)
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class Communicating(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                torch.distributed.all_reduce(p.data)


def weights(*dtypes: torch.dtype) -> list[nn.Parameter]:
    shapes = ((8, 4), (3, 9), (2, 5, 3), (5,), ())
    return [nn.Parameter(torch.randn(shape).to(dtype)) for dtype in dtypes or (torch.float32,) for shape in shapes]


def warming(p: Any) -> torch.optim.Optimizer:
    """Its learning rate is 0 before the first step."""
    optimizer = torch.optim.Adafactor(p)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    return optimizer


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS can't be sharded, as it failed"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam can't be sharded, as it failed"),
        (lambda p: Coupled(p, lr=0.1), "Coupled can't be sharded, as its parameters influence each other.*turn shard"),
        (Wrapping, "Wrapping can't be sharded, as its step changes nothing .*use one optimizer with groups"),
        (lambda p: Communicating(p, lr=0.1), "Communicating can't be sharded.*communicates with other ranks"),
    ],
)
def test_optimizers_that_cannot_be_dealt_out_are_refused(make: Make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_separable(make(weights()))


def test_what_couples_parameters_of_two_dtypes_is_seen() -> None:
    """Adafactor's default epsilon is that of the dtype of the first parameter, and is used for all of a group."""
    with pytest.raises(UserError, match="influence each other"):
        check_separable(torch.optim.Adafactor(weights(torch.float32, torch.bfloat16)))
    both = weights(torch.float32, torch.bfloat16)
    assert check_separable(torch.optim.Adafactor(both, eps=(1e-30, 1e-3))).whole == set(both)


@pytest.mark.parametrize(
    ("make", "whole"),
    [
        (lambda p: torch.optim.AdamW(p), set()),
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
        (lambda p: torch.optim.Muon(p[:2]), {0, 1}),
        (lambda p: torch.optim.Adafactor(p), {0, 1, 2, 3, 4}),
        (warming, {0, 1, 2, 3, 4}),
        (lambda p: Noisy(p, lr=0.1), {0, 1, 2, 3, 4}),
        (lambda p: MuonAdamW([{"params": p[:2]}, {"params": p[2:]}]), {0, 1}),
    ],
)
def test_what_is_needed_whole_and_what_is_kept(make: Make, whole: set[int]) -> None:
    every = weights()
    optimizer = make(every)
    found = check_separable(optimizer)
    assert found.whole == {every[i] for i in whole}
    for parameter in every:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = {p: sum(v.nbytes for v in state.values()) for p, state in optimizer.state.items()}
    for parameter, size in held.items():
        # counts of updates, a few bytes, are left out where elements have a value each
        assert size - 4 <= found.state_bytes[parameter] <= size


def test_the_trial_leaves_the_optimizer_alone() -> None:
    weight = nn.Parameter(torch.ones(8, 4))
    optimizer = torch.optim.AdamW([weight])
    torch.optim.lr_scheduler.LinearLR(optimizer)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    assert check_separable(optimizer).state_bytes == {weight: 8 * 32}
    assert torch.equal(weight, torch.ones(8, 4))
    assert not calls
    assert not optimizer.state


def test_no_rank_is_off_its_fraction_by_more_than_the_largest_parameter() -> None:
    rng = random.Random(0)
    for _ in range(200):
        buckets = [[rng.choice((1, 7, 64, 64, 200)) for _ in range(rng.randrange(1, 9))] for _ in range(6)]
        fractions = [rng.choice((0.0, 0.1, 0.5, 1.0)) for _ in range(rng.randrange(1, 5))] + [0.3]
        owned = [0] * len(fractions)
        for sizes, owners in zip(buckets, deal_whole(buckets, fractions), strict=True):
            for size, owner in zip(sizes, owners, strict=True):
                owned[owner] += size
        total = sum(map(sum, buckets))
        for mine, fraction in zip(owned, fractions, strict=True):
            assert mine <= fraction / sum(fractions) * total + max(map(max, buckets))
            assert fraction or not mine
    assert deal_whole([[4, 4, 4, 4]], [1, 1]) == [[0, 1, 0, 1]]
    assert deal_whole([[1, 9, 2, 3, 3]], [1, 1]) == [[1, 0, 1, 1, 1]]
