"""Who holds what: every element has one owner, copies survive losses, empty ranges, one member, refusals."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heteromesh.planner.ownership.ownership import LostState, Ownership, stride_between
from heteromesh.planner.reduction.reduction import plan_reduction

FRACTIONS = st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda f: sum(f) > 1e-3).map(tuple)


def owned(fractions, copies=1, names=()) -> Ownership:
    members = tuple(range(3, 3 + len(fractions)))
    return Ownership(fractions=tuple(fractions), members=members, copies=copies, names=names)


@given(FRACTIONS, st.integers(0, 10**9))
def test_every_element_has_one_owner_and_owners_get_their_fraction(fractions, numel):
    ownership = owned(fractions)
    ranges = ownership.ranges(numel)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == numel
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    for (start, stop), fraction in zip(ranges, fractions, strict=True):
        assert start <= stop
        assert abs(stop - start - numel * fraction / sum(fractions)) <= 1 + 1e-5
        assert fraction or start == stop
    assert [r for m in ownership.members for r in ownership.ranges_held_by(m, numel)] == [
        r for r in ranges if r[0] < r[1]
    ]


@given(FRACTIONS)
def test_any_loss_is_survived_with_two_copies_and_so_are_two_that_are_no_neighbours(fractions):
    ownership = owned(fractions, copies=2)
    members = ownership.members
    for lost in [*combinations(members, 1), *combinations(members, 2)]:
        left = [m for m in members if m not in lost]
        apart = (lost[-1] - lost[0]) % len(members)
        if not left or apart in (1, len(members) - 1):
            continue
        for index, source in enumerate(ownership.sources(left)):
            assert source in left
            assert ownership.holds(source, index) or not fractions[index]


@given(FRACTIONS, st.integers(1, 4))
def test_each_range_is_held_as_often_as_there_are_copies(fractions, copies):
    ownership = owned(fractions, copies)
    for index, fraction in enumerate(fractions):
        holders = ownership.holders(index)
        assert holders[0] == ownership.members[index]
        assert len(set(holders)) == len(holders) == min(copies, len(fractions))
        held = [m for m in ownership.members if index in ownership.held_by(m)]
        assert sorted(held) == (sorted(holders) if fraction else [])
    assert ownership.sources(ownership.members) == list(ownership.members)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6), st.integers(0, 10**6))
def test_bounds_are_those_of_the_reduction_with_the_same_fractions(uplinks, numel):
    reduction = plan_reduction(range(len(uplinks)), uplinks, [1e3] * len(uplinks))
    assert owned(reduction.fractions).bounds(numel) == reduction.bounds(numel)


def test_a_member_mirrors_the_next_ones_range_and_the_last_one_the_first():
    ownership = owned([1, 1, 2, 0], copies=2)
    assert ownership.bounds(8) == (0, 2, 4, 8, 8)
    assert [ownership.holders(i) for i in range(4)] == [(3, 6), (4, 3), (5, 4), (6, 5)]
    assert [ownership.held_by(m) for m in ownership.members] == [(0, 1), (1, 2), (2,), (0,)]
    assert ownership.ranges_held_by(6, 8) == [(0, 2)]
    assert ownership.ranges_held_by(9, 8) == []
    assert ownership.sources([6, 4, 9]) == [6, 4, 4, 6]


def test_copies_are_on_another_host_where_there_is_one():
    assert stride_between(["a"] * 3) == 1
    assert stride_between(["a", "a", "b", "b"]) == 2
    assert stride_between(["a", "b", "a", "b"]) == 1
    assert stride_between(["a"]) == 1
    ownership = replace(owned([1, 1, 1, 1], copies=2), stride=2)
    assert [ownership.holders(i) for i in range(4)] == [(3, 5), (4, 6), (5, 3), (6, 4)]
    with pytest.raises(ValueError, match="stride 4 gives one of 4 members two copies"):
        replace(ownership, stride=4)


def test_lost_copies_end_in_a_sentence_with_the_names():
    named = owned([1, 1, 1, 1], copies=2, names=("a", "b", "c", "d"))
    with pytest.raises(LostState, match=r"^c and b were lost at once, and with them both copies of a part of the opt"):
        named.sources([3, 6])
    with pytest.raises(LostState, match=r"^member 4 was lost, and with it the only copy of a part"):
        owned([1, 1]).sources([3])
    with pytest.raises(LostState, match=r"all 3 copies"):
        owned([1, 1, 1, 1], copies=3).sources([3])


def test_what_has_no_elements_is_never_lost():
    # whoever is left may hand out nothing
    assert owned([1, 0, 1]).sources([5, 3]) == [3, 5, 5]


def test_one_member_holds_everything_once():
    ownership = owned([0.3], copies=2)
    assert ownership.bounds(7) == (0, 7)
    assert ownership.holders(0) == (3,)
    assert ownership.ranges_held_by(3, 7) == [(0, 7)]
    with pytest.raises(LostState, match="member 3 was lost"):
        ownership.sources([8])


def test_before_anything_is_dealt_out_everybody_holds_everything():
    whole = Ownership.whole()
    assert whole.is_whole
    assert whole.bounds(5) == (0, 5)
    assert whole.holders(0) == ()
    assert whole.holds(17, 0)
    assert whole.ranges_held_by(17, 5) == [(0, 5)]
    assert whole.sources([4, 2]) == [4]
    assert pickle.loads(pickle.dumps(whole)) == whole
    assert not owned([1]).is_whole


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fractions": (1.0,)}, "1 fractions and 0 names for 2 members"),
        ({"names": ("a",)}, "1 names for 2 members"),
        ({"members": (3, 3)}, "not all different"),
        ({"copies": 0}, "0 copies"),
        ({"fractions": (1.0, -0.5)}, "none may be negative"),
        ({"fractions": (0.0, 0.0)}, "one must be above zero"),
        ({"fractions": (1.0, float("nan"))}, "none may be negative"),
    ],
)
def test_what_fits_no_members_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Ownership(**{"fractions": (0.5, 0.5), "members": (0, 1)} | wrong)
