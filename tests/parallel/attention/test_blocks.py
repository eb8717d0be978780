"""Tiles on one rank: kernels, their merge, and the formula that stands in where there is no kernel."""

from __future__ import annotations

import math

import pytest
import torch

from heteromesh.parallel.attention.kernels import block
from heteromesh.parallel.attention.kernels.tiled import RowSum, tile_attention
from heteromesh.parallel.attention.kernels.tiles import Tile, covers_once, tiles_between
from heteromesh.parallel.attention.scoring import Scoring
from heteromesh.parallel.attention.token_ring import stand_in
from heteromesh.planner.splitting.layout import Segment


def draw(heads: int, tokens: int, dim: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, dim, generator=generator, dtype=torch.float64).to(dtype)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("tokens", [1, 2, 7, 65, 130])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_tiles_of_a_cut_sequence_equal_the_whole(tokens: int, kv_heads: int, cut: float) -> None:
    middle = max(1, int(cut * tokens))
    tiles = [Tile(0, middle, 0, middle, True)]
    if middle < tokens:
        tiles += [Tile(middle, tokens, 0, middle, False), Tile(middle, tokens, middle, tokens, True)]
    leaves = [draw(h, tokens, seed=i).requires_grad_() for i, h in enumerate((4, kv_heads, kv_heads))]
    grad = draw(4, tokens, seed=9)
    out, expected = tile_attention(*leaves, tiles, Scoring(scale=8**-0.5)), plain(*leaves, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_formula_equals_kernel(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = draw(4, 33, seed=1, dtype=dtype), draw(2, 33, seed=2, dtype=dtype), draw(2, 33, seed=3, dtype=dtype)
    grad = draw(4, 33, seed=4, dtype=dtype)
    out, lse = block.forward_block(q, k, v, causal, 0.3)
    ours, our_lse = block._math_forward(q, k, v, causal, 0.3)
    torch.testing.assert_close(ours, out)
    torch.testing.assert_close(our_lse, lse, check_stride=False)
    expected = block.backward_block(grad, q, k, v, out, lse, causal, 0.3)
    for a, b in zip(block._math_backward(grad, q, k, v, out, lse, causal, 0.3), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_merge_of_very_different_parts_is_exact() -> None:
    out, lse = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0.0, -1e4, 1e4], dtype=torch.float64)
    block.merge_into(out, lse, torch.full((3, 2), 5.0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(out[:, 0], torch.tensor([3.0, 5.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(lse, torch.tensor([math.log(2), 0.0, 1e4], dtype=torch.float64))


@pytest.mark.parametrize(
    ("q", "k", "causal"),
    [
        (draw(1, 0), draw(1, 3), False),
        (draw(1, 3), draw(1, 0), False),
        (draw(1, 3), draw(1, 4), True),
        (draw(1, 3, 16)[..., ::2], draw(1, 3), True),
    ],
)
def test_what_the_kernel_gets_wrong_is_never_handed_to_it(q: torch.Tensor, k: torch.Tensor, causal: bool) -> None:
    with pytest.raises(AssertionError):
        block.forward_block(q, k, k, causal, 1.0)


def test_rows_with_one_part_each_are_written_and_others_added() -> None:
    like = torch.zeros(4, 1, dtype=torch.bfloat16)
    once, twice = RowSum(like, [(2, 4), (0, 2)]), RowSum(like, [(0, 4), (0, 2)])
    assert (once.total.dtype, twice.total.dtype) == (torch.bfloat16, torch.float32)
    for rows in ((0, 4), (0, 2)):
        twice.add(rows, torch.ones(rows[1] - rows[0], 1))
    assert twice.result().flatten().tolist() == [2.0, 2.0, 1.0, 1.0]


def test_covers_once() -> None:
    assert covers_once([(2, 5), (0, 2)], 5)
    assert not covers_once([(0, 2)], 5)
    assert not covers_once([(0, 3), (2, 5)], 5)
    assert covers_once([], 0)
    assert not covers_once([], 1)


def test_zigzag_halves_join_into_one_tile() -> None:
    low = [Segment(0, 0, 3), Segment(0, 9, 12)]
    high = [Segment(0, 3, 6), Segment(0, 6, 9)]
    assert tiles_between(low, low, causal=True) == (Tile(0, 6, 0, 6, True),)
    assert tiles_between(low, high, causal=True) == (Tile(3, 6, 0, 6, False),)
    assert tiles_between(high, low, causal=True) == (Tile(0, 6, 0, 3, False),)
    assert tiles_between(high, low, causal=False) == (Tile(0, 6, 0, 6, False),)
    assert tiles_between(low, [Segment(1, 0, 3)], causal=False) == ()


def test_segments_out_of_order_are_tiled_one_by_one() -> None:
    block = [Segment(0, 3, 5), Segment(0, 0, 3)]
    tiles = tiles_between(block, block, causal=True)
    assert set(tiles) == {Tile(0, 2, 2, 5, False), Tile(0, 2, 0, 2, True), Tile(2, 5, 2, 5, True)}


@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
def test_stand_in_has_the_same_delta(size: float) -> None:
    grad, out = draw(3, 5, seed=1)[0] * size, draw(3, 5, seed=2)[0]
    delta = (grad * out).sum(-1)
    torch.testing.assert_close((stand_in(grad, delta) * grad).sum(-1), delta, rtol=1e-12, atol=0.0)
