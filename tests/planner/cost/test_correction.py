"""Costs corrected by what passes took: planted errors are found, one disturbed pass moves little, plans follow."""

import json
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import pytest

from heteromesh.planner.cost.correction import Correction, Learner
from heteromesh.planner.cost.devices import DeviceCosts, LinkCosts, combine
from heteromesh.planner.cost.passes import Costs, RateByDegree, load_of
from heteromesh.planner.model.attention import AttentionShape, ModelAttention, split_methods
from heteromesh.planner.plan import Step
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.sequences.timeline import step_seconds

HOSTS = (0, 1, 2, 3)
ATTENTION = ModelAttention(calls=4, shape=AttentionShape(heads=8, kv_heads=2, head_dim=32, itemsize=4))


def costs(speeds: tuple[float, ...], per_pair: float = 1e-7, work: float = 1.0) -> Costs:
    methods = split_methods(ATTENTION, HOSTS, 2e4)
    return Costs(
        seconds_per_token2=per_pair,
        seconds_per_token=1e-3,
        seconds_per_pass=0.01,
        speeds=speeds,
        capacity=(100_000,) * 4,
        methods=tuple(replace(m, work=work) for m in methods),
        rate=RateByDegree({4: 5e7}),
        hosts=HOSTS,
        attention=ATTENTION,
    )


def batch_of(rng: random.Random) -> list[int]:
    return [min(16384, 2 + int(rng.lognormvariate(7.2, 1.5))) for _ in range(8)]


Times = dict[tuple[int, int], float]


def times(step: Step, truth: Costs, rng: random.Random, disturbed: float = 0.0) -> tuple[Times, Times]:
    """(seconds, of that waited) under other costs, with noise of 5 % and some passes that take three times as long."""
    seconds, waits = {}, {}
    for position, p in enumerate(step.passes):
        method = truth.method(p.method)
        load = load_of([step.batch[k] for k in p.sequences], p.shards)
        fixed = truth.priced(p.ranks, method, load).fixed
        for rank, parts in zip(p.ranks, truth.computing(p.ranks, method, load), strict=True):
            waits[rank, position] = rng.random() if len(p.ranks) > 1 else 0.0
            took = (sum(parts) + fixed) * rng.lognormvariate(0, 0.05) * (3 if rng.random() < disturbed else 1)
            seconds[rank, position] = took + waits[rank, position]
    return seconds, waits


def real_seconds(step: Step, truth: Costs) -> float:
    lengths = step.batch
    passes = [
        replace(p, seconds=truth.pass_seconds(p.ranks, p.method, [lengths[k] for k in p.sequences], p.shards))
        for p in step.passes
    ]
    return step_seconds(passes, truth)


def learned(measured: Costs, truth: Costs, *, steps: int, disturbed: float = 0.0, seed: int = 0) -> Correction:
    rng = random.Random(seed)
    learner, correction = Learner(), Correction()
    for _ in range(steps):
        # a limit that is not reached, but too short for the integer program
        step = plan_step(batch_of(rng), correction.applied(measured), time_limit=0.9)
        learner.add(range(4), measured, step, *times(step, truth, rng, disturbed))
        correction = learner.correction(range(4), 0.5)
    return correction


@pytest.mark.parametrize("seed", range(3))
def test_planted_errors_are_found(seed: int) -> None:
    truth = costs((1.0, 0.9, 0.5, 0.55), per_pair=1.3e-7, work=1.15)
    measured = costs((0.6, 1.0, 1.0, 0.5), per_pair=0.8e-7)
    correction = learned(measured, truth, steps=12, disturbed=0.05, seed=seed)
    assert correction.seconds_per_step == 0.5
    now = correction.applied(measured)
    assert now.speeds == pytest.approx(truth.speeds, rel=0.2)
    ratios, rng = [], random.Random(100 + seed)
    for _ in range(5):
        batch = batch_of(rng)
        best = plan_step(batch, truth).seconds
        ratios.append([real_seconds(plan_step(batch, c), truth) / best for c in (now, measured)])
    mine, before = (sum(r) / len(r) for r in zip(*ratios, strict=True))
    assert mine < 1.15 < 1.3 < before


def test_right_costs_stay_and_a_disturbed_pass_moves_little() -> None:
    truth = costs((1.0, 1.0, 0.5, 0.5))
    assert learned(truth, truth, steps=12).applied(truth).speeds == pytest.approx(truth.speeds, abs=0.04)
    rng = random.Random(1)
    learner = Learner()
    for i in range(8):
        step = plan_step(batch_of(rng), truth)
        seconds, waits = times(step, truth, rng)
        if i == 7:
            at = max((key for key in seconds if key[0] == 2), key=seconds.__getitem__)
            seconds[at] *= 5
        learner.add(range(4), truth, step, seconds, waits)
    assert learner.correction(range(4), 0).slowness[2] == pytest.approx(1.0, abs=0.12)


def test_a_rank_that_becomes_slow_is_noticed_within_a_few_steps() -> None:
    measured = costs((1.0, 1.0, 1.0, 1.0))
    rng = random.Random(2)
    learner = Learner()
    for i in range(12):
        step = plan_step(batch_of(rng), measured)
        learner.add(range(4), measured, step, *times(step, costs((1.0, 0.5 if i >= 8 else 1.0, 1.0, 1.0)), rng))
    assert learner.correction(range(4), 0).applied(measured).speeds[1] < 0.7


def test_what_was_not_seen_stays() -> None:
    measured = costs((1.0, 1.0, 0.5, 0.5))
    nothing = Learner().correction(range(4), 0.25)
    assert nothing.applied(measured) == replace(measured, seconds_per_step=0.25)
    learner = Learner()
    step = plan_step([900], measured)
    ranks = step.passes[0].ranks
    learner.add(range(4), measured, step, {(r, 0): 4.0 for r in ranks}, dict.fromkeys(((r, 0) for r in ranks), 0.0))
    unseen = set(range(4)) - set(ranks)
    assert all(learner.correction(range(4), 0).slowness[r] == 1.0 for r in unseen)


def test_split_passes_do_not_count_where_waiting_is_not_known() -> None:
    measured = costs((1.0,) * 4)
    learner = Learner(waits_known=False)
    step = plan_step([16000], measured)
    assert len(step.passes[0].ranks) > 1
    learner.add(range(4), measured, step, *times(step, costs((0.5,) * 4), random.Random(0)))
    assert learner.correction(range(4), 0) == Correction()


def test_passes_that_the_costs_cannot_price_do_not_count() -> None:
    measured = costs((1.0,) * 4)
    step = plan_step([16000], measured)
    for change in ({"method": "of a plan file"}, {"offload": 0.5}):
        learner = Learner()
        other = replace(step, passes=tuple(replace(p, **change) for p in step.passes))
        learner.add(range(4), measured, other, *times(step, costs((0.5,) * 4), random.Random(0)))
        assert learner.correction(range(4), 0) == Correction()


def test_a_correction_survives_json() -> None:
    correction = learned(costs((1.0,) * 4), costs((1.0, 1.0, 0.5, 0.5)), steps=3)
    assert Correction(**json.loads(json.dumps(asdict(correction)))).applied(costs((1.0,) * 4)).speeds == (
        correction.applied(costs((1.0,) * 4)).speeds
    )


def of_members(members: Sequence[int], speeds: Mapping[int, float]) -> Costs:
    """The costs of some members of a job, each as fast as it is wherever it runs."""
    devices = [DeviceCosts(1e-7 / speeds[m], 1e-3 / speeds[m], 0.01 / speeds[m], 100_000) for m in members]
    hosts = range(len(members))
    methods = split_methods(ATTENTION, hosts, 2e4)
    return combine(devices, LinkCosts(5e7, 0.0), typical=[1000], methods=methods, attention=ATTENTION)


MEASURED, TRUE = dict.fromkeys(range(10, 16), 1.0), {10: 1.0, 11: 0.5, 12: 1.0, 13: 0.7, 14: 1.0, 15: 1.0}


def learn_from(learner: Learner, rng: random.Random, *memberships: Sequence[int]) -> None:
    for members in memberships:
        step = plan_step(batch_of(rng), of_members(members, MEASURED))
        learner.add(members, of_members(members, MEASURED), step, *times(step, of_members(members, TRUE), rng))


def test_what_was_learned_of_a_member_stays_when_others_come_and_go() -> None:
    rng, learner = random.Random(3), Learner()
    learn_from(learner, rng, *[(10, 11, 12)] * 4, *[(11, 12, 13)] * 3, *[(11, 13)] * 3)
    slowness = dict(zip(range(10, 15), learner.correction(range(10, 15), 0).slowness, strict=True))
    assert slowness[11] / slowness[12] == pytest.approx(2, rel=0.1)
    assert slowness[13] / slowness[12] == pytest.approx(1 / 0.7, rel=0.1)
    assert slowness[10] / slowness[12] == pytest.approx(1, rel=0.1), "it left, and may be asked for"
    assert slowness[14] == 1.0, "never seen"
    for members in ((14, 11), (13, 11, 10), (12,)):
        now = learner.correction(members, 0.5).applied(of_members(members, MEASURED))
        assert now.speeds == pytest.approx(of_members(members, TRUE).speeds, abs=0.12)
        assert now.seconds_per_step == 0.5


def test_members_who_learn_from_the_same_reports_agree_and_one_that_joins_later_too() -> None:
    one, other, late = Learner(), Learner(), Learner()
    for learner in (one, other):
        learn_from(learner, random.Random(4), *[(10, 11)] * 5)
    late.adopt(pickle.loads(pickle.dumps(one.state())))
    for learner in (one, other, late):
        learn_from(learner, random.Random(5), *[(10, 11, 13)] * 10)
    assert one.correction((13, 10), 0) == other.correction((13, 10), 0) == late.correction((13, 10), 0)


def test_reports_that_were_lost_with_their_member_do_not_count() -> None:
    rng, learner, members = random.Random(6), Learner(), (10, 11)
    for _ in range(4):
        step = plan_step([700, 600, 500, 400], of_members(members, MEASURED))
        seconds, waits = times(step, of_members(members, TRUE), rng)
        learner.add(members, of_members(members, MEASURED), step, {k: v for k, v in seconds.items() if k[0]}, waits)
    first, second = learner.correction(members, 0).slowness
    assert first == 1.0
    assert second > 1.7


def test_devices_of_members_combine_to_the_costs_of_the_job() -> None:
    fast, slow = DeviceCosts(1e-8, 1e-4, 0.01, 900), DeviceCosts(4e-8, 4e-4, 0.04, 300)
    methods = split_methods(ATTENTION, (0, 1, 2), 2e4)
    job = combine([slow, fast, fast], LinkCosts(1e8, 1e-3), typical=[500], methods=methods, seconds_per_step=0.2)
    assert job.speeds == (0.25, 1.0, 1.0)
    assert job.capacity == (300, 900, 900)
    assert job.hosts == (0, 1, 2)
    assert (job.seconds_per_token, job.seconds_per_round, job.seconds_per_step) == (1e-4, 1e-3, 0.2)
    assert job.rate((0, 1)) == 1e8
    assert job.method_for((0, 1)) is not None
    assert job.pass_seconds((1,), "local", [500], [[500]]) == pytest.approx(fast.seconds([500]))
    alone = combine([slow, fast], None, typical=[500], methods=methods)
    assert alone.method_for((0, 1)) is None, "nothing is known of exchanges, so no pass has several members"
