"""When a step ends: transfers that passes hide in part."""

import random
from dataclasses import replace

import pytest

from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.cost.passes import Costs, RateByDegree
from heteromesh.planner.plan import Pass
from heteromesh.planner.report.check import check_step
from heteromesh.planner.report.simulate import simulate_step
from heteromesh.planner.sequences.bound import bound_seconds
from heteromesh.planner.sequences.step import plan_step, step_seconds


def alone(rank, seconds):
    return Pass(ranks=(rank,), method="local", sequences=(0,), shards=((1,),), seconds=seconds)


def costs(ranks, traffic, speeds=()):
    return Costs(
        seconds_per_token2=0.0,
        seconds_per_token=1e-3,
        seconds_per_pass=0.0,
        speeds=speeds or (1.0,) * ranks,
        capacity=(1000,) * ranks,
        methods=(),
        rate=RateByDegree({}),
        hosts=tuple(range(ranks)),
        traffic=traffic,
    )


def test_what_backward_of_the_last_pass_is_too_short_for_is_exposed():
    traffic = StepTraffic(reduce_seconds=5.0, chunks=10)
    # two passes of 3 s: the last backward takes 2 s, the sum goes on for 3 s and one part of backward's
    assert traffic.step_seconds([alone(0, 3.0), alone(0, 3.0)], [6.0]) == pytest.approx(4.0 + 5.0 + 0.2)
    # all of it in one pass of 6 s: backward takes 4 s
    assert traffic.step_seconds([alone(0, 6.0)], [6.0]) == pytest.approx(2.0 + 5.0 + 0.4)
    hidden = replace(traffic, reduce_seconds=1.0)
    assert hidden.step_seconds([alone(0, 6.0)], [6.0]) == pytest.approx(6.0 + 0.1)


def test_layer_major_hides_under_all_passes():
    traffic = StepTraffic(gather_seconds=2.0, reduce_seconds=3.0, chunks=10, forward_share=0.25, layer_major=True)
    passes = [alone(0, 4.0), alone(0, 4.0)]
    assert traffic.step_seconds(passes, [8.0]) == pytest.approx(2.0 + 0.2 + 6.0 + 0.3)
    assert traffic.step_seconds(passes, [8.0]) == traffic.at_least(8.0)


def test_a_rank_without_passes_still_waits_for_all_transfers():
    traffic = StepTraffic(gather_seconds=1.0, reduce_seconds=2.0, chunks=4)
    assert traffic.step_seconds([], [0.0]) == 3.0
    both = traffic.step_seconds([alone(0, 0.3)], [0.3, 0.0])
    assert both == pytest.approx(1.0 + 0.1 / 4 + 2.0 + 0.2 / 4)


@pytest.mark.parametrize("layer_major", [False, True])
def test_no_list_of_passes_goes_below_the_bound(layer_major):
    rng = random.Random(3)
    for _ in range(200):
        traffic = StepTraffic(
            gather_seconds=rng.choice([0.0, rng.uniform(0, 2)]),
            reduce_seconds=rng.choice([0.0, rng.uniform(0, 4)]),
            chunks=rng.randint(1, 8),
            forward_share=rng.choice([1 / 3, 1 / 4]),
            layer_major=layer_major,
        )
        ranks = rng.randint(1, 3)
        passes = [alone(rng.randrange(ranks), rng.uniform(0.1, 2)) for _ in range(rng.randint(1, 6))]
        ends = [sum(p.seconds for p in passes if p.ranks == (r,)) for r in range(ranks)]
        seconds = traffic.step_seconds(passes, ends)
        assert seconds >= traffic.at_least(max(ends)) - 1e-12
        assert seconds >= max(max(ends), traffic.gather_seconds + traffic.reduce_seconds) - 1e-12


def test_plan_check_and_simulation_agree():
    traffic = StepTraffic(gather_seconds=0.05, reduce_seconds=0.4, chunks=8)
    model = costs(3, traffic, speeds=(1.0, 0.5, 0.25))
    step = plan_step([200, 300, 150, 90, 60], model)
    check_step(step, model)
    assert step.bound_seconds == bound_seconds(step.batch, model)
    assert step.seconds == step_seconds(step.passes, model)
    assert step.seconds > step_seconds(step.passes, replace(model, traffic=StepTraffic()))
    assert simulate_step(step, model, {}).seconds == pytest.approx(step.seconds)
    slow = simulate_step(step, model, {0: 3.0}).seconds
    assert slow is not None
    assert slow > step.seconds
