"""Every method against one process: exact, repeatable, whatever the split."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from heteromesh.parallel.attention.api import attention, prepare_pass
from packs import SPLIT, Pack, make_pack, methods_for, one_process, own_rows, strange, tensors
from ranks import World, run_ranks

LONG = {0: 1500, 1: 4000}


def run_method(world: World, pack: Pack, method: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv of this rank's rows, and the rows."""
    context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
    rows = own_rows(context.layout, context.member)
    q, k, v, grad = (strange(t[:, :, rows], pack.seed + i) for i, t in enumerate(inputs))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with context.active():
        out = attention(q, k, v, causal=pack.causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), rows]


def deviations(got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """Errors of each tensor, relative to its largest entry or 1."""
    return [
        (a.double() - b[:, :, rows]).abs() / max(1.0, float(b.abs().max())) for a, b in zip(got, exact, strict=True)
    ]


def fuzz(world: World, packs: Sequence[Pack], dtype: torch.dtype) -> dict[str, float]:
    """By method the largest error; asserts repeatability."""
    # uninitialised memory is filled with NaN: nothing may be used before it was written or received
    torch.use_deterministic_algorithms(True)
    errors: dict[str, float] = {}
    for pack in packs:
        if world.rank not in pack.ranks:
            continue
        inputs = tensors(pack, dtype)
        exact = one_process(pack, [t.double() for t in inputs])
        for method in methods_for(pack):
            *got, rows = run_method(world, pack, method, inputs)
            for error in deviations(got, exact, rows):
                # a comparison with NaN is false: `not <=` keeps it
                if error.numel() and not float(error.max()) <= errors.setdefault(method, 0.0):
                    errors[method] = float(error.max())
            if pack.seed % 4 == 0:
                *again, _ = run_method(world, pack, method, inputs)
                assert all(map(torch.equal, got, again)), f"{method} is not repeatable for {pack}"
    return errors


@pytest.mark.parametrize(("size", "count"), [(1, 10), (2, 30), (3, 24), (4, 20)])
def test_methods_equal_one_process(size: int, count: int) -> None:
    packs = [make_pack(1000 * size + i, size, LONG.get(i)) for i in range(count)]
    for errors in run_ranks(size, fuzz, packs, torch.float64):
        assert errors
        assert {m: e for m, e in errors.items() if not e <= 1e-12} == {}


@pytest.mark.parametrize("size", [2, 4])
def test_float32(size: int) -> None:
    packs = [make_pack(2000 * size + i, size, 1000 if i == 0 else None) for i in range(6)]
    for errors in run_ranks(size, fuzz, packs, torch.float32):
        assert errors
        assert {m: e for m, e in errors.items() if not e <= 1e-5} == {}


def square_errors(world: World, packs: Sequence[Pack]) -> dict[tuple[str, int], tuple[float, float]]:
    """By method and tensor (out, dq, dk, dv): squared errors in bf16, of the method and of one process."""
    sums: dict[tuple[str, int], tuple[float, float]] = {}
    for pack in packs:
        if world.rank not in pack.ranks:
            continue
        inputs = tensors(pack, torch.bfloat16)
        exact, plain = one_process(pack, [t.double() for t in inputs]), one_process(pack, inputs)
        for method in methods_for(pack):
            *got, rows = run_method(world, pack, method, inputs)
            alone = deviations([t[:, :, rows] for t in plain], exact, rows)
            for i, (a, b) in enumerate(zip(deviations(got, exact, rows), alone, strict=True)):
                ours, theirs = sums.get((method, i), (0.0, 0.0))
                sums[method, i] = ours + float(a.square().sum()), theirs + float(b.square().sum())
    return sums


@pytest.mark.parametrize("size", [2, 4])
def test_bfloat16_is_about_as_good_as_on_one_process(size: int) -> None:
    packs = [make_pack(3000 * size + i, size, 1000 if i == 0 else None) for i in range(12)]
    results = run_ranks(size, square_errors, packs)
    for key in {key for sums in results for key in sums}:
        ours, alone = (sum(sums[key][i] for sums in results if key in sums) for i in (0, 1))
        assert (ours / alone) ** 0.5 <= 1.5, f"{key}: {(ours / alone) ** 0.5:.2f} times the error of one process"


def gradients(world: World, method: str) -> bool:
    pack = make_pack(5, 2)
    pack = Pack((0, 1), (5, 1, 3), ((2, 1, 0), (3, 0, 3)), (1.0, 2.0), 2, 1, 2, True, 3)
    context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
    rows = own_rows(context.layout, context.member)
    whole = [t.requires_grad_() for t in tensors(pack, torch.float64)[:3]]

    def everyone(*inputs: torch.Tensor) -> torch.Tensor:
        with context.active():
            mine = attention(*(t[:, :, rows] for t in inputs))
        return Assemble.apply(mine, rows, sum(pack.lengths), world)

    return torch.autograd.gradcheck(Whole(everyone, world), whole)


class Assemble(torch.autograd.Function):
    """The rows of all ranks as one tensor on every rank."""

    @staticmethod
    def forward(ctx, mine, rows, total, world):
        ctx.rows = rows
        out = mine.new_zeros(*mine.shape[:2], total, mine.shape[3])
        out[:, :, rows] = mine
        return world.sum(out)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, :, ctx.rows], None, None, None


class Whole:
    """A function of replicated inputs, with gradients summed over the ranks."""

    def __init__(self, act, world):
        self.act, self.world = act, world

    def __call__(self, *inputs):
        return self.act(*(SumGradient.apply(t, self.world) for t in inputs))


class SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.world.sum(grad.contiguous().clone()), None


@pytest.mark.parametrize("method", SPLIT)
def test_gradcheck_on_two_ranks(method: str) -> None:
    assert run_ranks(2, gradients, method) == [True, True]
