"""Every method against one process: exact, repeatable, whatever the split."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from packs import SPLIT, Pack, make_pack, one_process, own_rows, strange, tensors

from heteromesh.parallel.attention import attention, prepare_pass
from ranks import World, run_ranks

LONG = {0: 700, 1: 1500, 2: 4000}


def run_method(world: World, pack: Pack, method: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv of this rank's rows, and the rows."""
    context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
    rows = own_rows(context.layout, context.member)
    q, k, v, grad = (strange(t[:, :, rows], pack.seed + i) for i, t in enumerate(inputs))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with context.active():
        out = attention(q, k, v, causal=pack.causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), rows]


def worst(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], rows: torch.Tensor) -> list[float]:
    """Largest error of each tensor, relative to its largest entry or 1."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        scale = max(1.0, float(b.abs().max()))
        error = (a.double() - b[:, :, rows].double()).abs()
        errors.append(float(error.max()) / scale if error.numel() else 0.0)
    return errors


def methods_for(pack: Pack) -> list[str]:
    if len(pack.ranks) == 1:
        return ["local"]
    return [m for m in SPLIT if m != "ulysses" or pack.heads >= len(pack.ranks)]


def fuzz(world: World, packs: Sequence[Pack], dtype: torch.dtype) -> dict[str, list[float]]:
    """By method, the errors of every pack, those of one process first; asserts repeatability."""
    # uninitialised memory is filled with NaN: nothing may be used before it was written or received
    torch.use_deterministic_algorithms(True)
    errors: dict[str, list[float]] = {}
    for pack in packs:
        if world.rank not in pack.ranks:
            continue
        inputs = tensors(pack, dtype)
        exact = one_process(pack, [t.double() for t in inputs])
        plain = one_process(pack, inputs) if dtype != torch.float64 else exact
        for method in methods_for(pack):
            *got, rows = run_method(world, pack, method, inputs)
            errors.setdefault(method, []).append(max(worst(got, exact, rows)))
            errors.setdefault(f"{method} alone", []).append(max(worst([t[:, :, rows] for t in plain], exact, rows)))
            if pack.seed % 4 == 0:
                *again, _ = run_method(world, pack, method, inputs)
                assert all(map(torch.equal, got, again)), f"{method} is not repeatable for {pack}"
    return errors


@pytest.mark.parametrize(("size", "count"), [(1, 20), (2, 70), (3, 60), (4, 60)])
def test_methods_equal_one_process(size: int, count: int) -> None:
    packs = [make_pack(1000 * size + i, size, LONG.get(i)) for i in range(count)]
    for errors in run_ranks(size, fuzz, packs, torch.float64, seconds=100):
        assert {m: max(e) for m, e in errors.items() if not max(e) <= 1e-12} == {}


@pytest.mark.parametrize("size", [2, 4])
def test_float32(size: int) -> None:
    packs = [make_pack(2000 * size + i, size, LONG.get(i)) for i in range(20)]
    for errors in run_ranks(size, fuzz, packs, torch.float32):
        assert {m: max(e) for m, e in errors.items() if not max(e) <= 1e-5} == {}


@pytest.mark.parametrize("size", [2, 4])
def test_bfloat16_is_about_as_good_as_on_one_process(size: int) -> None:
    packs = [make_pack(3000 * size + i, size, LONG.get(i)) for i in range(20)]
    results = run_ranks(size, fuzz, packs, torch.bfloat16)
    for method in ("ulysses", *SPLIT):
        ours, alone = (max(e for r in results for e in r[name]) for name in (method, f"{method} alone"))
        assert ours <= 1.5 * alone, f"{method}: {ours:.2e} against {alone:.2e}"


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
