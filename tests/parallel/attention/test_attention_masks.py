"""Windows, chunks, sinks and capped scores: every method against the formula with a mask of all pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import attention, prepare_pass
from heteromesh.parallel.attention.kernels import block
from heteromesh.parallel.attention.kernels.tiles import tiles_between
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.splitting.layout import Segment, contiguous, zigzag
from heteromesh.planner.splitting.masked import masked
from packs import Pack, make_masked_pack, methods_for, own_rows, sinks_of, strange, tensors, written_out
from ranks import World, run_ranks


def asked(pack: Pack) -> dict[str, Any]:
    return {"causal": pack.causal, "window": pack.window, "chunk": pack.chunk, "softcap": pack.softcap}


def run_method(world: World, pack: Pack, method: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The rows, out, dq, dk, dv of this rank's rows and, where there are sinks, their gradient."""
    context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
    rows = own_rows(context.layout, context.member)
    q, k, v, grad = (strange(t[:, :, rows], pack.seed + i) for i, t in enumerate(inputs))
    sinks = sinks_of(pack, q.dtype)
    leaves = [t.requires_grad_() for t in (q, k, v, *([] if sinks is None else [sinks]))]
    with context.active():
        out = attention(q, k, v, sinks=sinks, **asked(pack))
    return [rows, out.detach(), *torch.autograd.grad(out, leaves, grad)]


def fuzz(world: World, packs: Sequence[Pack], dtype: torch.dtype) -> dict[str, float]:
    """By method the largest error relative to the largest entry of a tensor, or to 1; asserts repeatability."""
    # uninitialised memory is filled with NaN: nothing may be used before it was written or received
    torch.use_deterministic_algorithms(True)
    errors: dict[str, float] = {}
    for pack in packs:
        inputs = tensors(pack, dtype)
        exact = written_out(pack, [t.double() for t in inputs])
        for method in methods_for(pack):
            shares = torch.zeros(pack.heads, dtype=torch.float64)
            if world.rank in pack.ranks:
                rows, *got = run_method(world, pack, method, inputs)
                pairs = list(zip(got, (t[:, :, rows] for t in exact[:4]), exact, strict=False))
                worst = [
                    float((a.double() - b).abs().max()) / max(1.0, float(c.abs().max()))
                    for a, b, c in pairs
                    if b.numel()
                ]
                errors[method] = max([errors.get(method, 0.0), *worst], key=lambda e: (e != e, e))
                if pack.seed % 4 == 0:
                    assert all(map(torch.equal, [rows, *got], run_method(world, pack, method, inputs))), method
                shares = got[4].double() if pack.sinks else shares
            if pack.sinks:
                # every rank has the gradient of its own rows or heads
                total = world.sum(shares)
                error = float((total - exact[4]).abs().max()) / max(1.0, float(exact[4].abs().max()))
                errors[method] = max([errors.get(method, 0.0), error], key=lambda e: (e != e, e))
    return errors


@pytest.mark.parametrize(("size", "count"), [(1, 15), (2, 15), (3, 12), (4, 10)])
def test_methods_equal_the_formula(size: int, count: int) -> None:
    packs = [make_masked_pack(7000 * size + i, size, 900 if i == 0 else None) for i in range(count)]
    for errors in run_ranks(size, fuzz, packs, torch.float64):
        assert errors
        assert {m: e for m, e in errors.items() if not e <= 1e-10} == {}


@pytest.mark.parametrize("size", [2, 3])
def test_float32(size: int) -> None:
    packs = [make_masked_pack(8000 * size + i, size) for i in range(5)]
    for errors in run_ranks(size, fuzz, packs, torch.float32):
        assert errors
        assert {m: e for m, e in errors.items() if not e <= 1e-5} == {}


def sizes_of(rng: random.Random) -> tuple[list[int], list[list[int]]]:
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 3))]
    shards = [[0] * len(lengths) for _ in range(rng.randint(1, 4))]
    for j, length in enumerate(lengths):
        for _ in range(length):
            shards[rng.randrange(len(shards))][j] += 1
    return lengths, shards


@pytest.mark.parametrize("seed", range(60))
def test_tiles_are_the_mask_every_pair_once(seed: int) -> None:
    rng = random.Random(seed)
    lengths, shards = sizes_of(rng)
    mask = Mask(window=rng.choice([None, *range(1, 40)]), chunk=rng.choice([None, *range(1, 40)]))
    layout = rng.choice([zigzag, contiguous])(lengths, shards)
    cut, left = masked(layout, mask)
    assert [sum(map(len, row)) for row in cut.segments] == [sum(row) for row in shards]
    for queries, q_cut in zip(layout.segments, cut.segments, strict=True):
        for keys, k_cut in zip(layout.segments, cut.segments, strict=True):
            seen = torch.zeros(sum(map(len, queries)), sum(map(len, keys)), dtype=torch.int)
            for t in tiles_between(q_cut, k_cut, causal=left.causal, window=left.window):
                part = torch.ones(t.q1 - t.q0, t.k1 - t.k0, dtype=torch.int)
                part = part.tril() if t.causal else part.triu() if t.leaving else part
                seen[t.q0 : t.q1, t.k0 : t.k1] += part
            assert torch.equal(seen, pairs(queries, keys, mask)), (mask, queries, keys)


def pairs(queries: Sequence[Segment], keys: Sequence[Segment], mask: Mask) -> torch.Tensor:
    """What is seen, by rows of both blocks."""
    (sq, q), (sk, k) = places(queries), places(keys)
    seen = (sq[:, None] == sk) & (k <= q[:, None])
    if mask.window:
        seen &= q[:, None] - k < mask.window
    if mask.chunk:
        seen &= q[:, None] // mask.chunk == k // mask.chunk
    return seen.int()


def places(segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, position) of every row."""
    rows = [(s.sequence, t) for s in segments for t in range(s.start, s.end)]
    table = torch.tensor(rows, dtype=torch.long).view(-1, 2)
    return table[:, 0], table[:, 1]


@pytest.mark.parametrize(
    "options", [{"window": 7}, {"chunk": 5}, {"sinks": True}, {"softcap": 1.0}, {"window": 3, "sinks": True}]
)
def test_outside_a_pass_every_row_of_the_batch_is_a_sequence(options: dict[str, Any]) -> None:
    pack = replace(Pack((0,), (20,), ((20,),), (1.0,), 4, 2, 8, True, 3), **options)
    rows = [tensors(replace(pack, seed=seed), torch.float64) for seed in (3, 9)]
    sinks = sinks_of(pack, torch.float64)
    out = attention(*(torch.cat(ts) for ts in list(zip(*rows, strict=True))[:3]), sinks=sinks, **asked(pack))
    for got, inputs in zip(out, rows, strict=True):
        torch.testing.assert_close(got, written_out(pack, inputs)[0][0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("causal", [True, False])
def test_few_rows_at_a_time_change_nothing(
    causal: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, grad, out = (torch.randn(1, 4, 33, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    k, v = (torch.randn(1, 2, 33, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    lse = torch.randn(1, 4, 33, generator=generator, dtype=torch.float64) + 3

    def both() -> list[torch.Tensor]:
        forward = block._math_forward(q, k, v, causal, 0.3, softcap)
        return [*forward, *block._math_backward(grad, q, k, v, out, lse, causal, 0.3, softcap)]

    at_once = both()
    monkeypatch.setattr(block, "SCORES", 4 * 33 * 5)
    for a, b in zip(both(), at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"window": 0}, "window=0: it must be at least 1"),
        ({"chunk": -3}, "chunk=-3: it must be at least 1"),
        ({"window": 4, "causal": False}, "window=4 and causal=False"),
        ({"softcap": 0.0}, "softcap=0.0: it must be above 0"),
        ({"sinks": torch.zeros(3)}, r"sinks \(3,\) on cpu and 4 heads"),
    ],
)
def test_what_makes_no_mask_is_refused(options: dict[str, Any], rule: str) -> None:
    q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    with pytest.raises(UserError, match=rule):
        attention(q, k, k, **options)


def differing(world: World) -> str:
    pack = Pack((0, 1), (8,), ((4,), (4,)), (1.0, 1.0), 4, 2, 8, True, 0)
    context = prepare_pass(pack.planned("gather"), pack.lengths, world, pack.speeds)
    q, k = torch.zeros(1, 4, 4, 8), torch.zeros(1, 2, 4, 8)
    with context.active(), pytest.raises(ValueError, match="must call attention alike") as caught:
        attention(q, k, k, window=3 + world.rank, chunk=5)
    return str(caught.value)


def test_ranks_with_other_windows_are_told_both() -> None:
    for told in run_ranks(2, differing):
        assert "causal, window 3, chunk 5" in told
        assert "causal, window 4, chunk 5" in told
