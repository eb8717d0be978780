"""Steps in which no rank may get more tokens than it can hold until the step ends."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from heteromesh.errors import UserError
from heteromesh.planner.cost.json import costs_from_json, costs_to_json
from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.cost.shards import shares
from heteromesh.planner.report.check import check_step
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.sequences.timeline import tokens_of


def costs_of(speeds: tuple[float, ...], limits: tuple[int, ...], capacity: int = 900) -> Costs:
    return Costs(
        seconds_per_token2=1e-7,
        seconds_per_token=1e-4,
        seconds_per_pass=1e-3,
        speeds=speeds,
        capacity=(capacity,) * len(speeds),
        methods=(Method(name="gather", bytes_per_token=512.0),),
        rate=RateByDegree({2: 1e9}),
        hosts=tuple(range(len(speeds))),
        step_capacity=limits,
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spare", [1.0, 1.02, 1.3, 3.0])
def test_no_rank_gets_more_than_it_holds(seed: int, spare: float) -> None:
    """The fastest rank can hold the least, so a plan by speed alone does not fit; with 1.0 every token counts."""
    draw = random.Random(seed)
    batch = [min(800, int(draw.lognormvariate(4.5, 1.0)) + 1) for _ in range(draw.randrange(5, 40))]
    speeds = tuple(draw.choice((1.0, 0.7, 0.3)) for _ in range(draw.randrange(2, 5)))
    weights = [1 / v for v in speeds]
    limits = [int(spare * sum(batch) * w / sum(weights)) for w in weights]
    limits[-1] += max(0, sum(batch) - sum(limits))
    costs = costs_of(speeds, tuple(limits))
    step = plan_step(batch, costs, time_limit=0.05)
    check_step(step, costs)
    assert all(n <= most for n, most in zip(tokens_of(step.passes, costs.ranks), limits, strict=True))
    free = plan_step(batch, replace(costs, step_capacity=()), time_limit=0.05)
    assert step.bound_seconds == pytest.approx(free.bound_seconds)
    if spare > 1.1:
        # what the limits force on the other ranks, and little more
        per_token = 1e-4 + 1e-7 * sum(n * n for n in batch) / sum(batch)
        dealt = shares(sum(batch), speeds, limits)
        forced = per_token * max(n / v for n, v in zip(dealt, speeds, strict=True))
        assert step.seconds < 1.35 * max(free.seconds, forced)


def test_a_batch_that_is_too_large_is_told() -> None:
    with pytest.raises(UserError, match=r"batch has 600 tokens.* of 500 in a step \(200 \+ 300\): lower batch_tokens"):
        plan_step([300, 300], costs_of((1.0, 1.0), (200, 300)))
    # one rank can't split what it can't hold
    alone = replace(costs_of((1.0, 1.0), (350, 350)), methods=())
    with pytest.raises(UserError, match=r"sequence 2 \(90 tokens\) finds no ranks"):
        plan_step([300, 300, 90], replace(alone, step_capacity=(340, 360)))


def test_the_check_and_the_file_know_the_limits() -> None:
    costs = costs_of((1.0, 0.5), (10_000, 10_000))
    step = plan_step([400, 300, 200], costs)
    assert costs_from_json(costs_to_json(costs), "costs").step_capacity == costs.step_capacity
    tight = replace(costs, step_capacity=(100, 10_000))
    with pytest.raises(UserError, match=r"rank 0 gets \d+ tokens in all its passes but holds the layer inputs of 100"):
        check_step(step, tight)
