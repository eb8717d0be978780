"""Exchanges among any ranks, and the gradient sum."""

import time
from typing import Any

import pytest
import torch

from heteromesh.comm.collectives.uneven import open_collectives
from heteromesh.comm.exchange import Exchange
from heteromesh.comm.gradients.sum import GradientSum
from heteromesh.comm.world import pick_device
from heteromesh.errors import UserError
from heteromesh.planner.reduction.reduction import Reduction
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


class Branches(torch.nn.Module):
    """Which parameters get a gradient depends on the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)
        self.unused = torch.nn.Parameter(torch.ones(4))
        self.low = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        hidden = self.a(x)
        return (self.b(hidden) * self.low.float()).sum() if both else hidden.sum()


def sums(world: World, bucket_bytes: int, owners: bool) -> None:
    if not owners:
        check_sums(GradientSum(world, bucket_bytes=bucket_bytes), world)
        return
    shares = [float(rank) for rank in range(world.size)]
    reduction = Reduction(
        hosts=tuple(range(world.size)),
        fractions=tuple(share / sum(shares) for share in shares),
        seconds_per_byte=0.0,
        bound_seconds_per_byte=0.0,
        ring_seconds_per_byte=1.0,
    )
    collectives = open_collectives(world.gradients, reduction)
    check_sums(GradientSum(world, collectives, bucket_bytes=bucket_bytes), world)
    collectives.close()


def check_sums(gradients: GradientSum, world: World) -> None:
    """Rank r runs r passes (rank 0 none), every other one through half of the model; twice, after poison."""
    torch.manual_seed(3)
    model = Branches()
    gradients.attach(model.parameters())
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
        gradients.clear(model.parameters())
        for number in range(world.rank):
            if number == world.rank - 1:
                gradients.arm()
            model(torch.full((2, 3), float(world.rank + number)), number % 2 == 0).backward()
        if world.rank == 0:
            gradients.arm()
        gradients.finish()
        expected = Branches()
        expected.load_state_dict(model.state_dict())
        for rank in range(world.size):
            for number in range(rank):
                expected(torch.full((2, 3), float(rank + number)), number % 2 == 0).backward()
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            if theirs.grad is None:
                assert mine.grad is None, "as in one process: an optimizer with weight decay would move it"
            else:
                tolerance = 3e-2 if mine.dtype == torch.bfloat16 else 1e-5
                assert torch.allclose(mine.grad, theirs.grad, rtol=tolerance, atol=1e-6)
    gradients.detach()


@pytest.mark.parametrize(
    ("ranks", "bucket_bytes", "owners"),
    [(2, 1, False), (2, 64, True), (4, 1, True), (4, 64, False), (4, 1 << 20, False), (4, 1 << 20, True)],
)
def test_gradient_sum_with_unequal_passes(ranks: int, bucket_bytes: int, owners: bool) -> None:
    run_ranks(ranks, sums, bucket_bytes, owners)


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return grad


def early_start(world: World) -> tuple[int, int]:
    """(when the last layer's bucket left, when the backward of the first layer began), nanoseconds."""
    first, last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    gradients = GradientSum(world, bucket_bytes=1)
    gradients.attach([*first.parameters(), *last.parameters()])
    gradients.clear([])
    gradients.arm()
    last(Slow.apply(first(torch.ones(1, 8)))).sum().backward()
    done = time.time_ns()
    gradients.finish()
    return min(s.start_ns for s in world.recorder.spans if s.name == "gradient sum 0"), done


def test_sums_leave_while_the_backward_still_runs() -> None:
    for left, done in run_ranks(2, early_start):
        assert done - left > 0.15e9, "the last layer's sum starts before the slow backward below it is through"


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="local rank 1 has no CUDA device"):
        pick_device()
