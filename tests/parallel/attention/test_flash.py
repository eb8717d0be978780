"""The check that a block kernel must pass before it is used; torch's CUDA kernel itself needs a GPU."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from heteromesh.parallel.attention.kernels import block
from heteromesh.parallel.attention.kernels.block import CPU_FLASH, FORMULA
from heteromesh.parallel.attention.kernels.flash import FLASH, Kernel, Kind, checked

NO_GPU = "no CUDA device on this machine"


def kind(dtype: torch.dtype = torch.bfloat16, causal: bool = True, groups: int = 2, device: str = "cpu") -> Kind:
    return Kind(torch.device(device), dtype, 64, causal, groups)


def own_out_and_lse(grad, q, k, v, out, lse, causal, scale):
    """A backward that takes the block for the whole row."""
    return CPU_FLASH.backward(grad, q, k, v, *CPU_FLASH.forward(q, k, v, causal, scale), causal, scale)


def one_wrong(place: int):
    """A backward of which one gradient is off in one row."""

    def backward(*args):
        parts = [x.clone() for x in CPU_FLASH.backward(*args)]
        parts[place][..., -1, :] += 1
        return tuple(parts)

    return backward


def with_lse(change):
    def forward(*args):
        out, lse = CPU_FLASH.forward(*args)
        return out, change(lse)

    return replace(CPU_FLASH, forward=forward)


def with_out(change):
    def forward(*args):
        out, lse = CPU_FLASH.forward(*args)
        return change(out), lse

    return replace(CPU_FLASH, forward=forward)


def raising(error: Exception) -> Kernel:
    def act(*args):
        raise error

    return replace(CPU_FLASH, backward=act)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_right_kernel_is_taken_without_a_word(dtype: torch.dtype, causal: bool, groups: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(CPU_FLASH, FORMULA, kind(dtype, causal, groups)) is CPU_FLASH


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (with_lse(lambda x: x / 0.6931), "gives lse that differs"),
        (with_lse(lambda x: x.transpose(1, 2)), "gives lse as"),
        (with_lse(lambda x: torch.full_like(x, torch.nan)), "gives lse that differs"),
        (with_out(lambda x: x.flip(2)), "gives out that differs"),
        (with_out(lambda x: x.float()), "gives out as"),
        (replace(CPU_FLASH, forward=lambda q, k, v, causal, scale: CPU_FLASH.forward(q, k, v, False, scale)), "lse"),
        (replace(CPU_FLASH, backward=own_out_and_lse), "gives dq that differs"),
        (replace(CPU_FLASH, backward=one_wrong(0)), "gives dq that differs"),
        (replace(CPU_FLASH, backward=one_wrong(1)), "gives dk that differs"),
        (replace(CPU_FLASH, backward=one_wrong(2)), "gives dv that differs"),
        (raising(RuntimeError("head dim must be a multiple of 8\nmore")), r"raises RuntimeError \(head dim must"),
        (raising(TypeError()), r"raises TypeError \(no text\)"),
    ],
)
def test_a_wrong_kernel_is_refused_with_a_warning(candidate: Kernel, why: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"{why}.*the formula is used instead") as said:
        assert checked(candidate, FORMULA, kind()) is FORMULA
    assert len(said) == 1


def test_the_check_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    checked(CPU_FLASH, FORMULA, kind())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kind_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # the CUDA operator has no CPU kernel: it raises, as a torch without it would
    block._cuda_kernel.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="raises NotImplementedError") as said:
            assert [block._cuda_kernel(kind()) for _ in range(3)] == [FORMULA] * 3
        assert len(said) == 1
    finally:
        block._cuda_kernel.cache_clear()


def test_the_formula_keeps_its_precision_under_autocast() -> None:
    q = torch.randn(1, 2, 50, 16, generator=torch.Generator().manual_seed(0))
    plain = FORMULA.forward(q, q, q, True, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        under = FORMULA.forward(q, q, q, True, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_the_operators_take_these_arguments() -> None:
    # torch's shape functions for them, without a device: names, order and layouts, not values
    q, k = torch.empty(1, 8, 40, 64, device="meta"), torch.empty(1, 2, 24, 64, device="meta")
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    out, lse = FLASH.forward(q, k, k, False, 0.125)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (1, 8, 40), torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv = FLASH.backward(q, q, k, k, out, lse, False, 0.125)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_torchs_cuda_kernel_is_right(dtype: torch.dtype, causal: bool, groups: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(FLASH, FORMULA, kind(dtype, causal, groups, "cuda:0")) is FLASH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("groups", [1, 4])
def test_torchs_cuda_kernel_is_repeatable(groups: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, h, 4000, 128) for h in (4 * groups, 4 * groups, 4, 4)]
    grad, q, k, v = (torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes)
    out, lse = block.forward_block(q, k, v, True, 0.1)
    first, second = (block.backward_block(grad, q, k, v, out, lse, True, 0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
