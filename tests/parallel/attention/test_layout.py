"""Layouts: every token once, work where the tokens are, and moving between them."""

from __future__ import annotations

import pytest

from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.planner.splitting.heads import head_shares
from heteromesh.planner.splitting.layout import Layout, Segment, inner_degree, method_layout, zigzag
from packs import SPLIT, Pack, make_pack
from ranks import World

PACKS = [make_pack(i, 1 + i % 4) for i in range(80)]


@pytest.mark.parametrize("method", ["local", *SPLIT, "ulysses_ring:1"])
def test_every_token_is_held_once_by_the_member_that_the_plan_says(method: str) -> None:
    for pack in PACKS:
        layout = method_layout(method, pack.lengths, pack.shards)
        assert sorted(layout.order) == list(range(sum(pack.lengths)))
        for member, row in enumerate(pack.shards):
            held = [0] * len(pack.lengths)
            for s in layout.segments[member]:
                assert len(s) > 0
                held[s.sequence] += len(s)
            assert held == list(row)


def test_zigzag_work_follows_tokens() -> None:
    layout = zigzag([600], [[100], [300], [200]])
    work = [sum(t + 1 for s in segments for t in range(s.start, s.end)) for segments in layout.segments]
    for tokens, pairs in zip((100, 300, 200), work, strict=True):
        assert abs(pairs - tokens * 601 / 2) <= 300


def test_the_middle_member_of_a_zigzag_has_one_piece() -> None:
    assert zigzag([8], [[4], [4]]).segments == ((Segment(0, 0, 2), Segment(0, 6, 8)), (Segment(0, 2, 6),))


def test_inner_degree() -> None:
    assert [inner_degree("ulysses_ring", n) for n in (1, 2, 3, 4, 6, 8, 12)] == [1, 1, 1, 2, 2, 2, 3]
    assert inner_degree("ulysses_ring:8", 16) == 8


@pytest.mark.parametrize(
    "method", ["ulysses_ring:3", "ulysses_ring:0", "ulysses_ring:x", "ulysses_ring:", "magic", "ring:2"]
)
def test_unknown_methods_and_degrees_are_refused(method: str) -> None:
    with pytest.raises(UserError, match=method):
        method_layout(method, [8], [[4], [4]])


@pytest.mark.parametrize("shards", [((3,), (1,)), ((6,), (-1,)), ((5,),), ((5, 0), (0, 0))])
def test_shards_that_do_not_add_up_are_refused(shards: tuple[tuple[int, ...], ...]) -> None:
    pack = Pack((0, 1), (5,), shards, (1.0, 1.0), 2, 2, 8, True, 0)
    with pytest.raises(ValueError, match="shards"):
        prepare_pass(pack.planned("ring"), pack.lengths, World(size=2), pack.speeds)


def test_a_layout_without_tokens() -> None:
    assert Layout((), ((), ())).order == []


def test_heads_are_dealt_with_the_key_heads_they_use() -> None:
    shares = head_shares(8, 2, [1.0] * 4)
    assert [(s.first, s.last, s.first_key, s.last_key) for s in shares] == [
        (0, 2, 0, 1), (2, 4, 0, 1), (4, 6, 1, 2), (6, 8, 1, 2),
    ]  # fmt: skip
    assert [s.keys_at_work for s in shares] == [1, 1, 1, 1]
    # five query heads on two key heads of four each: one has four, the other one
    first, second = head_shares(8, 2, [5.0, 3.0])
    assert (first.keys, first.keys_at_work) == (2, 5)
    assert (second.keys, second.keys_at_work) == (1, 1)
    with pytest.raises(ValueError, match="2 heads can't be dealt to 3 ranks"):
        head_shares(2, 1, [1.0] * 3)
