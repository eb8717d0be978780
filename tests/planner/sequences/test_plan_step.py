"""plan_step: every step passes the independent check, whatever the cluster; bad batches are refused in one sentence."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bound import even, fitting_batch, random_costs

from heteromesh.errors import UserError
from heteromesh.planner.cluster.links import Links
from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.cost.shards import deal
from heteromesh.planner.plan import Step
from heteromesh.planner.report.check import check_step
from heteromesh.planner.sequences.static import static_sequence_parallel
from heteromesh.planner.sequences.step import plan_step, step_seconds

RATES = {2: 1.2535e11, 4: 1.0913e11, 8: 1.0119e11, 16: 1.0832e10, 32: 6.229e9, 64: 5.107e9}


def flexsp(ranks: int, **changes) -> Costs:
    """FlexSP's 7B constants."""
    base = {
        "seconds_per_token2": 5.128e-9,
        "seconds_per_token": 1.839576e-4,
        "seconds_per_pass": 0.62936,
        "speeds": (1.0,) * ranks,
        "capacity": (6407,) * ranks,
        "methods": (Method(name="ulysses", bytes_per_token=2097152.0),),
        "rate": RateByDegree(RATES),
        "hosts": tuple(r // 8 for r in range(ranks)),
    }
    return Costs(**(base | changes))


def lognormal(seed: int, count: int, most: int, mu: float = 7.2, sigma: float = 1.5) -> list[int]:
    draw = np.random.default_rng(seed).lognormal(mu, sigma, 20 * count)
    return [int(n) for n in draw if 1 <= n <= most][:count]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_every_step_passes_the_check(seed):
    rng = random.Random(seed)
    costs = random_costs(rng, rng.randint(1, 9))
    check_step(plan_step(fitting_batch(rng, costs, rng.randint(1, 40)), costs), costs)


@pytest.mark.parametrize(("ranks", "count"), [(1, 500), (3, 20), (8, 1), (8, 60), (64, 512), (256, 64)])
def test_sizes(ranks, count):
    costs = flexsp(ranks)
    step = plan_step(lognormal(1, count, min(190_000, 6407 * ranks)), costs)
    check_step(step, costs)
    assert step.gap < 0.1


@pytest.mark.parametrize("mu_sigma", [(7.2, 1.5), (7.0, 1.75)])
def test_close_to_the_bound_on_64_ranks(mu_sigma):
    costs = flexsp(64)
    gaps = [plan_step(lognormal(seed, 512, 196_608, *mu_sigma), costs, time_limit=1).gap for seed in range(3)]
    assert sum(gaps) / len(gaps) < 0.04


def test_unequal_speeds_and_memories_are_used():
    half = flexsp(8, speeds=(1.0,) * 4 + (0.5,) * 4, capacity=(6407,) * 4 + (3203,) * 4)
    step = plan_step(lognormal(3, 80, 30_000), half, time_limit=1)
    check_step(step, half)
    assert step.gap < 0.08
    tokens = [sum(sum(p.shards[p.ranks.index(r)]) for _, p in step.passes_of(r)) for r in range(8)]
    assert sum(tokens[:4]) / sum(tokens[4:]) == pytest.approx(2.0, rel=0.25)


def test_slow_network_keeps_a_pass_inside_a_host():
    hosts, slow = (0, 0, 0, 0, 1, 1, 1, 1), (1e7, 1e7)
    rate = Links(hosts=hosts, link=(1e11, 1e11), fabrics=("", ""), fabric_nics=slow, ethernet=slow)
    costs = replace(flexsp(8), rate=rate, hosts=hosts)
    step = plan_step([20_000, 20_000, 20_000, 20_000], costs)
    check_step(step, costs)
    assert all(len({r // 4 for r in p.ranks}) == 1 for p in step.passes)


def test_degrees_need_not_be_powers_of_two():
    costs = flexsp(3)
    step = plan_step([18_000], costs)
    assert [p.ranks for p in step.passes] == [(0, 1, 2)]


def test_equal_sequences_share_a_split_pass_where_that_balances_better():
    # Ten on eight ranks: one rank each leaves two ranks with twice the time of the others.
    costs = flexsp(8)
    step = plan_step([3000] * 10, costs)
    assert step.seconds < 1.45
    assert step.seconds <= static_sequence_parallel([3000] * 10, costs).seconds * 1.001


def test_no_worse_than_static_layout_on_medium_sequences():
    for seed in range(4):
        batch = [int(n) for n in np.random.default_rng(seed).integers(3000, 9000, 30)]
        costs = flexsp(3)
        assert plan_step(batch, costs).seconds <= static_sequence_parallel(batch, costs).seconds * 1.01


def test_local_passes_fill_the_time_before_a_split_pass():
    # With two ranks per long sequence and three ranks, one rank would wait.
    costs = even(3, seconds_per_pass=1.0)
    step = plan_step([150, 150, 60, 60, 60, 60], costs, time_limit=1)
    check_step(step, costs)
    assert step.gap < 0.25


def test_equal_input_gives_an_equal_step():
    costs, batch = flexsp(8), lognormal(5, 60, 40_000)
    first, second = (plan_step(batch, costs, time_limit=10) for _ in range(2))
    assert replace(first, solve_seconds=0.0) == replace(second, solve_seconds=0.0)


def test_order_of_the_batch_does_not_change_the_time():
    costs, batch = flexsp(8), lognormal(5, 60, 40_000)
    shuffled = random.Random(0).sample(batch, len(batch))
    assert plan_step(batch, costs, time_limit=10).seconds == pytest.approx(
        plan_step(shuffled, costs, time_limit=10).seconds, rel=1e-3
    )


def test_passes_are_listed_by_start():
    costs = flexsp(8)
    step = plan_step(lognormal(2, 80, 50_000), costs)
    free, begun = [0.0] * 8, []
    for p in step.passes:
        begun.append(max(free[r] for r in p.ranks))
        for r in p.ranks:
            free[r] = begun[-1] + p.seconds
    assert begun == sorted(begun)
    assert step.seconds == step_seconds(step.passes, costs)


def test_fixed_cost_of_a_step_counts_once():
    batch = lognormal(2, 30, 10_000)
    plain, more = (plan_step(batch, flexsp(4, seconds_per_step=s)) for s in (0.0, 7.0))
    assert more.seconds - plain.seconds == pytest.approx(7.0)
    assert more.bound_seconds - plain.bound_seconds == pytest.approx(7.0)


@pytest.mark.parametrize("value", [0, -3, 2.5, math.nan, math.inf, "7", None, True, np.float64(3.0)])
def test_bad_length_is_named(value):
    with pytest.raises(UserError, match=r"^sequence 1 has length .*whole number of tokens, at least 1$") as caught:
        plan_step([5, value], flexsp(2))
    assert repr(value) in str(caught.value)


def test_numpy_integers_are_lengths():
    assert plan_step(np.array([5, 6], dtype=np.int32), flexsp(2)).batch == (5, 6)


def test_empty_batch():
    with pytest.raises(UserError, match="batch is empty"):
        plan_step([], flexsp(2))


def test_overlong_sequence_says_what_fits():
    costs = flexsp(4, capacity=(100, 50, 70, 100))
    check_step(plan_step([320], costs), costs)
    with pytest.raises(
        UserError, match=r"sequence 1 has 321 tokens but at most 320 fit .*tokens_per_device.*max_length"
    ):
        plan_step([5, 321], costs)


def test_overlong_sequence_where_the_method_limits_the_degree():
    costs = flexsp(4, capacity=(100, 50, 70, 100), methods=(Method(name="ulysses", bytes_per_token=1.0, heads=2),))
    check_step(plan_step([200], costs), costs)
    with pytest.raises(UserError, match="at most 200 fit on the best 2 of 4 ranks"):
        plan_step([201], costs)


def test_without_a_method_sequences_stay_on_one_rank():
    costs = flexsp(2, methods=())
    assert all(len(p.ranks) == 1 for p in plan_step([6000] * 5, costs).passes)
    with pytest.raises(UserError, match="at most 6407 fit"):
        plan_step([6408], costs)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_deal_is_exact_and_within_memory(seed):
    rng = random.Random(seed)
    ranks = rng.randint(1, 9)
    room = [rng.randint(1, 50) for _ in range(ranks)]
    lengths, left = [], sum(room) if rng.random() < 0.3 else rng.randint(1, sum(room))
    while left:
        lengths.append(rng.randint(1, left))
        left -= lengths[-1]
    shards = deal(lengths, [rng.choice([0.1, 0.5, 1.0]) for _ in room], room)
    assert [sum(column) for column in zip(*shards, strict=True)] == lengths
    assert all(sum(row) <= n and min(row) >= 0 for row, n in zip(shards, room, strict=True))


def checked_example() -> tuple[Step, Costs]:
    costs = flexsp(3, capacity=(6000, 6000, 3000))
    step = plan_step([14_000, 3000, 200, 40], costs)
    check_step(step, costs)
    return step, costs


def spoil(step: Step, which: int, **changes) -> Step:
    passes = list(step.passes)
    passes[which] = replace(passes[which], **changes)
    return replace(step, passes=tuple(passes))


def test_check_finds_what_is_wrong():
    step, costs = checked_example()
    wide = next(i for i, p in enumerate(step.passes) if len(p.ranks) == 3)
    p = step.passes[wide]
    moved = (tuple(n + (j == 0) for j, n in enumerate(p.shards[0])), *p.shards[1:])
    over = ((6001, *p.shards[0][1:]), *p.shards[1:])
    minus = (tuple(-1 if j == 0 else n for j, n in enumerate(p.shards[0])), *p.shards[1:])
    cases = [
        (replace(step, passes=step.passes[1:]), "exactly once"),
        (replace(step, passes=(*step.passes, step.passes[0])), "exactly once"),
        (spoil(step, wide, sequences=(99, *p.sequences[1:])), "not in the batch"),
        (spoil(step, wide, ranks=(0, 1, 3)), "not one of the cluster's 3 ranks"),
        (spoil(step, wide, ranks=(0, 2, 1)), "ascend"),
        (spoil(step, wide, ranks=(0, 1, 1)), "ascend"),
        (spoil(step, wide, ranks=()), "names no rank"),
        (spoil(step, wide, method="local"), "`local` is for exactly one"),
        (spoil(step, wide, method="magic"), "unknown"),
        (spoil(step, wide, shards=p.shards[:2]), "rows"),
        (spoil(step, wide, shards=moved), "sum to"),
        (spoil(step, wide, shards=over), "holds 6000"),
        (spoil(step, wide, shards=minus), "at least 0"),
        (spoil(step, wide, seconds=p.seconds * 0.99), "seconds"),
        (replace(step, seconds=step.seconds * 1.01), "step: seconds"),
        (replace(step, bound_seconds=step.seconds * 1.01), "bound_seconds"),
        (replace(step, gap=step.gap + 0.1), "gap"),
        (replace(step, batch=(*step.batch[:-1], 0)), "at least 1"),
    ]
    for bad, message in cases:
        with pytest.raises(UserError, match=message):
            check_step(bad, costs)
    few_heads = replace(costs, methods=(replace(costs.methods[0], heads=2),))
    with pytest.raises(UserError, match="can't split over 3 ranks"):
        check_step(step, few_heads)
