"""The static even layouts: feasible, even, exact, and refused where they can't be."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from test_plan_step import flexsp, lognormal

from heteromesh.errors import UserError
from heteromesh.planner.cost.passes import Method
from heteromesh.planner.report.check import check_step
from heteromesh.planner.sequences.static import (
    even_shards,
    static_best_degree,
    static_data_parallel,
    static_sequence_parallel,
)
from heteromesh.planner.sequences.step import plan_step
from instances import random_costs, random_lengths


def test_sequence_parallel_has_all_ranks_in_every_pass_and_even_shards():
    costs = flexsp(8)
    step = static_sequence_parallel(lognormal(1, 100, 50_000), costs)
    check_step(step, costs)
    for p in step.passes:
        assert p.ranks == tuple(range(8))
        tokens = [sum(row) for row in p.shards]
        assert max(tokens) - min(tokens) <= 1
    assert step.seconds == pytest.approx(sum(p.seconds for p in step.passes))


def test_sequence_parallel_packs_best_fit():
    costs = flexsp(2, capacity=(50, 50))
    step = static_sequence_parallel([60, 50, 40, 30, 20], costs)
    assert sorted(sorted(step.batch[k] for k in p.sequences) for p in step.passes) == [[20, 30, 50], [40, 60]]


def test_sequence_parallel_on_one_rank_is_local():
    step = static_sequence_parallel([5, 6], flexsp(1))
    check_step(step, flexsp(1))
    assert [p.method for p in step.passes] == ["local"]


def test_data_parallel_deals_in_arrival_order_by_count():
    costs = flexsp(3)
    batch = lognormal(2, 50, 6407)
    step = static_data_parallel(batch, costs)
    check_step(step, costs)
    for p in step.passes:
        assert {k % 3 for k in p.sequences} == {p.ranks[0]}


def test_planned_beats_both():
    costs, batch = flexsp(8), lognormal(4, 120, 6407)
    planned = plan_step(batch, costs).seconds
    assert planned < static_data_parallel(batch, costs).seconds
    assert planned < static_sequence_parallel(batch, costs).seconds


def test_unequal_memory_limits_even_shards():
    costs = flexsp(2, capacity=(100, 40))
    check_step(static_sequence_parallel([80, 20], costs), costs)
    with pytest.raises(UserError, match="sequence 0 has 81 tokens but even shards on ranks 0 to 1 hold at most 80"):
        static_sequence_parallel([81], costs)


def test_data_parallel_refuses_what_one_rank_cannot_hold():
    with pytest.raises(UserError, match="sequence 1 has 50 tokens but even shards on rank 1 hold at most 40"):
        static_data_parallel([90, 50], flexsp(2, capacity=(100, 40)))


def test_sequence_parallel_needs_a_method_for_all_ranks():
    costs = flexsp(4, methods=(Method(name="ulysses", bytes_per_token=1.0, heads=2),))
    with pytest.raises(UserError, match="no method splits a sequence over 4 ranks"):
        static_sequence_parallel([10], costs)


@pytest.mark.parametrize("layout", [static_data_parallel, static_sequence_parallel])
@pytest.mark.parametrize("batch", [[], [0], [3, 2.5]])
def test_bad_batches(layout, batch):
    with pytest.raises(UserError):
        layout(batch, flexsp(2))


def test_even_shards():
    shards = even_shards([7, 5, 1], 3)
    assert [sum(column) for column in zip(*shards, strict=True)] == [7, 5, 1]
    assert [sum(row) for row in shards] in ([5, 4, 4], [4, 5, 4], [4, 4, 5])


@pytest.mark.parametrize("seed", range(25))
def test_best_degree_is_the_best_and_no_plan_is_behind_it(seed: int) -> None:
    rng = random.Random(seed)
    costs = random_costs(rng, rng.choice([1, 2, 4, 6]))
    batch = random_lengths(rng, sum(costs.capacity) // 2)
    try:
        best = static_best_degree(batch, costs)
    except UserError:
        return
    check_step(best, costs)
    assert plan_step(batch, costs).seconds <= best.seconds
    for layout in (static_data_parallel, static_sequence_parallel):
        with suppress(UserError):
            assert best.seconds <= layout(batch, costs).seconds


def test_best_degree_may_lie_between_the_ends() -> None:
    costs = flexsp(8)
    batch = [8 * costs.capacity[0] // 3, *[1000] * 30] * 4
    assert {len(p.ranks) for p in static_best_degree(batch, costs).passes} == {4}


def test_best_degree_names_what_fits_nowhere() -> None:
    with pytest.raises(UserError, match="81 tokens"):
        static_best_degree([81], flexsp(2, capacity=(40, 40)))
