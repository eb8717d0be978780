"""What attention refuses inside a pass: alone before anything is sent, together where ranks differ."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import attention, prepare_pass
from packs import SPLIT, Pack
from ranks import World, run_ranks

PACK = Pack((0, 1), (8,), ((4,), (4,)), (1.0, 1.0), 4, 2, 8, True, 0)


def inputs(heads: int = 4, kv_heads: int = 2, tokens: int = 4, dim: int = 8, **options: Any) -> list[torch.Tensor]:
    return [torch.zeros(1, h, tokens, dim, **options) for h in (heads, kv_heads, kv_heads)]


def refused(world: World, method: str, tensors: list[torch.Tensor]) -> str:
    context = prepare_pass(PACK.planned(method), PACK.lengths, world, PACK.speeds)
    with context.active(), pytest.raises(ValueError) as caught:  # noqa: PT011
        attention(*tensors)
    assert world.recorder.sent_bytes == 0
    return str(caught.value)


MIXED = [*inputs()[:2], inputs(dtype=torch.float64)[2]]


@pytest.mark.parametrize(
    ("method", "tensors", "rule"),
    [
        ("ulysses", inputs(1, 1), "deals heads to 2 ranks and attention has 1: use at most 1 ranks"),
        ("ring", inputs(dtype=torch.int32), "one dtype among float64, float32, bfloat16, float16, got int32"),
        ("gather", MIXED, "got float32, float32, float64"),
        ("token_ring", inputs(device="meta"), "on the world's device cpu, got meta"),
        ("trimmed_ring", inputs(tokens=5), r"\(1, heads, 4, dim\) for this rank's tokens"),
        ("ulysses_ring", inputs(3, 2), "query heads in multiples of key heads"),
        ("ring", inputs(4, 0), "at least one head and dimension"),
        ("ring", inputs(0, 0), "at least one head and dimension"),
        ("ring", inputs(dim=0), "at least one head and dimension"),
        ("ring", [*inputs()[:2], inputs(device="meta")[2]], "on one device, got cpu, cpu and meta"),
        ("gather", [torch.zeros(2, 4, 4, 8)] * 3, r"\(1, heads, 4, dim\)"),
        ("gather", [torch.zeros(4, 4, 8)] * 3, "attention takes q"),
    ],
)
def test_refused_before_anything_is_sent(method: str, tensors: list[torch.Tensor], rule: str) -> None:
    assert re.search(rule, refused(World(size=2), method, tensors))


def test_ulysses_ring_needs_heads_for_its_inner_ranks_only() -> None:
    pack = Pack((0, 1, 2, 3), (8,), ((2,),) * 4, (1.0,) * 4, 1, 1, 8, True, 0)
    context = prepare_pass(pack.planned("ulysses_ring"), pack.lengths, World(size=4), pack.speeds)
    with context.active(), pytest.raises(ValueError, match="deals heads to 2 ranks"):
        attention(*inputs(1, 1, 2))


def test_methods_that_do_not_fit_the_pass() -> None:
    with pytest.raises(UserError, match="unknown method 'magic': use one of local, ulysses, gather, ring"):
        prepare_pass(PACK.planned("magic"), PACK.lengths, World(size=2), PACK.speeds)
    with pytest.raises(ValueError, match="'local' is for one rank, and the pass names 2"):
        prepare_pass(PACK.planned("local"), PACK.lengths, World(size=2), PACK.speeds)
    with pytest.raises(ValueError, match="rank 2 is not one of the pass's ranks"):
        prepare_pass(PACK.planned("ring"), PACK.lengths, World(rank=2, size=3), PACK.speeds)


ODD = {
    "heads": (inputs(8, 2), {}),
    "key heads": (inputs(4, 4), {}),
    "dim": (inputs(dim=16), {}),
    "dtype": (inputs(dtype=torch.float64), {}),
    "mask": (inputs(), {"causal": False}),
}


def differ(world: World, cases: list[tuple[str, str]]) -> list[str]:
    """What is told, one after the other: a call that is refused leaves nothing of it on the wire."""
    told = []
    for method, what in cases:
        context = prepare_pass(PACK.planned(method), PACK.lengths, world, PACK.speeds)
        tensors, options = ODD[what] if world.rank == 1 else (inputs(), {})
        with context.active(), pytest.raises(ValueError, match="must call attention alike") as caught:
            attention(*tensors, **options)
        told.append(str(caught.value))
    return told


def test_a_rank_that_differs_is_an_error_on_every_rank() -> None:
    cases = [*((method, "heads") for method in SPLIT), *(("ring", what) for what in ODD)]
    first, second = run_ranks(2, differ, cases)
    assert first == second
    assert all("rank 0 called (4 heads, 2 key heads, dim 8, float32, causal" in sentence for sentence in first)


def other_plan(world: World) -> None:
    method = ("ring", "trimmed_ring")[world.rank]
    context = prepare_pass(PACK.planned(method), PACK.lengths, world, PACK.speeds)
    with context.active(), pytest.raises(ValueError, match="must call attention alike"):
        attention(*inputs())


def test_ranks_with_different_plans_are_an_error_on_every_rank() -> None:
    run_ranks(2, other_plan)


def one_fails(world: World) -> None:
    context = prepare_pass(PACK.planned("ring"), PACK.lengths, world, PACK.speeds)
    with context.active():
        attention(*inputs(dtype=torch.int32 if world.rank else torch.float32))


def test_a_rank_that_is_refused_alone_does_not_hang_its_peers() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 0:.*rank 1:.*one dtype among"):
        run_ranks(2, one_fails)


@pytest.mark.parametrize("causal", [True, False])
def test_outside_a_pass_it_is_plain_attention(causal: bool) -> None:
    q, k, v = (torch.randn(2, h, 5, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert torch.equal(attention(q, k, v, causal=causal), expected)
