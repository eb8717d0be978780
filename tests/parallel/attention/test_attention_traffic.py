"""The plan's prediction of bytes against what the ranks count."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from heteromesh.parallel.attention.api import attention, prepare_pass
from heteromesh.planner.splitting.traffic import AGREEMENT_BYTES, AttentionShape, Traffic, traffic
from packs import SPLIT, Pack, make_masked_pack, make_pack, own_rows, tensors
from ranks import World, run_ranks


def shape_of(pack: Pack, itemsize: int) -> AttentionShape:
    return AttentionShape(heads=pack.heads, kv_heads=pack.kv_heads, head_dim=pack.dim, itemsize=itemsize)


def predicted(pack: Pack, method: str, itemsize: int) -> tuple[Traffic, ...]:
    speeds = [pack.speeds[r] for r in pack.ranks]
    return traffic(method, pack.lengths, pack.shards, shape_of(pack, itemsize), speeds=speeds, mask=pack.mask)


def count(world: World, packs: Sequence[Pack], methods: Sequence[str], dtype: torch.dtype) -> None:
    for pack in packs:
        if world.rank not in pack.ranks or len(pack.ranks) == 1:
            continue
        for method in methods:
            expected = predicted(pack, method, dtype.itemsize)[pack.ranks.index(world.rank)]
            context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
            rows = own_rows(context.layout, context.member)
            q, k, v, grad = (t[:, :, rows] for t in tensors(pack, dtype))
            leaves = [t.requires_grad_() for t in (q, k, v)]
            counts = [world.recorder.sent_bytes]
            with context.active():
                for _ in range(2):
                    out = attention(*leaves, causal=pack.causal, window=pack.window, chunk=pack.chunk)
                    counts.append(world.recorder.sent_bytes)
            out.backward(grad)
            counts.append(world.recorder.sent_bytes)
            first, second, backward = (b - a for a, b in itertools.pairwise(counts))
            agreement = AGREEMENT_BYTES * (len(pack.ranks) - 1)
            assert first == expected.forward + agreement, f"{method} {pack}"
            assert (second, backward) == (expected.forward, expected.backward), f"{method} {pack}"


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float64), (3, torch.bfloat16), (4, torch.float32)])
def test_counted_bytes_equal_the_plans(size: int, dtype: torch.dtype) -> None:
    methods = [*SPLIT, "ulysses_ring:1"] + ["ulysses_ring:4"] * (size == 4)
    packs = [make(500 * size + i, size) for make in (make_pack, make_masked_pack) for i in range(8)]
    run_ranks(size, count, [p for p in packs if len(p.ranks) == size], methods, dtype)


def even(size: int, length: int = 960, heads: int = 8, kv_heads: int = 2) -> Pack:
    shards = tuple((length // size,) for _ in range(size))
    return Pack(tuple(range(size)), (length,), shards, (1.0,) * size, heads, kv_heads, 16, True, 0)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_trimmed_ring_sends_three_quarters_of_a_ring(size: int) -> None:
    pack = even(size)
    trimmed, ring = (predicted(pack, m, 2) for m in ("trimmed_ring", "ring"))
    keys = 960 // size * 2 * 2 * 16 * 2
    assert all(t == Traffic(forward=(size - 1) * keys, backward=2 * (size - 1) * keys) for t in ring)
    assert 4 * sum(t.forward for t in trimmed) == 3 * sum(t.forward for t in ring)
    assert 4 * sum(t.backward for t in trimmed) == 3 * sum(t.backward for t in ring)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_volumes_of_the_literature(size: int) -> None:
    pack = even(size, heads=8, kv_heads=8)
    tokens, row = 960 // size, 8 * 16 * 2
    ulysses = predicted(pack, "ulysses", 2)[0].forward
    assert ulysses == (size - 1) * tokens * 4 * row // size
    token = sum(t.forward for t in predicted(pack, "token_ring", 2)) / size
    assert token == 0.75 * (size - 1) * tokens * (2 * row + 4 * 8)
    bundle, home = 2 * row + 8 * 8, row
    assert sum(t.backward for t in predicted(pack, "token_ring", 2)) / size == 0.75 * (size - 1) * tokens * (
        bundle + home
    )


def test_short_sequences_of_a_pack_do_not_travel_further_than_their_ranks() -> None:
    shape = AttentionShape(heads=4, kv_heads=4, head_dim=8, itemsize=4)
    lengths, shards = (400, 100, 100, 100, 100), tuple((100,) + (0,) * i + (100,) + (0,) * (3 - i) for i in range(4))
    for method in ("trimmed_ring", "bidirectional_ring", "gather", "token_ring"):
        with_short, without = (
            traffic(method, lengths[:n], [row[:n] for row in shards], shape) for n in (len(lengths), 1)
        )
        assert with_short == without


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_window_sends_only_what_lies_before_the_borders_of_shards(size: int) -> None:
    """Each rank holds two pieces, whose last window - 1 keys the piece after them needs; the last piece has none."""
    pack = replace(even(size), window=9)
    keys = 8 * 2 * 2 * 16 * 2
    sent = predicted(pack, "gather", 2)
    # the middle of the sequence is one piece of the last rank
    borders = 2 * size - 2
    assert sum(t.forward for t in sent) == borders * keys == sum(t.backward for t in sent)
    for method in ("trimmed_ring", "bidirectional_ring"):
        windowed, whole = (sum(t.forward for t in predicted(p, method, 2)) for p in (pack, even(size)))
        assert windowed < whole / 10
    # the methods that move every token don't save any
    assert predicted(pack, "ring", 2) == predicted(even(size), "ring", 2)
    assert predicted(pack, "ulysses", 2) == predicted(even(size), "ulysses", 2)


def test_chunks_that_no_border_cuts_send_nothing() -> None:
    pack = replace(even(4), chunk=120)
    for method in ("gather", "trimmed_ring", "bidirectional_ring", "token_ring"):
        assert predicted(pack, method, 2) == (Traffic(),) * 4


def test_local_sends_nothing() -> None:
    assert predicted(even(1), "local", 4) == (Traffic(),)
