"""Costs corrected by what passes took: planted errors are found, one disturbed pass moves little, plans follow."""

import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.planner.cost.correction import Correction, Learner
from heteromesh.planner.cost.passes import Costs, RateByDegree, load_of
from heteromesh.planner.model.attention import AttentionShape, ModelAttention, split_methods
from heteromesh.planner.plan import Step
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.sequences.timeline import step_seconds
from heteromesh.runtime.report.compare import compare_run, comparison_text, read_run
from llama import Llama
from ranks import World, run_ranks
from steps import TINY

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
    learner, correction = Learner(measured), Correction()
    for _ in range(steps):
        # a limit that even a busy machine does not reach, but too short for the integer program
        step = plan_step(batch_of(rng), correction.applied(measured), time_limit=0.9)
        learner.add(step, *times(step, truth, rng, disturbed))
        correction = learner.correction(0.5)
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
    # plans are made in limited time, so how good they are depends on what else the machine does
    assert mine < 1.15 < 1.3 < before


def test_right_costs_stay_and_a_disturbed_pass_moves_little() -> None:
    truth = costs((1.0, 1.0, 0.5, 0.5))
    assert learned(truth, truth, steps=12).applied(truth).speeds == pytest.approx(truth.speeds, abs=0.04)
    rng = random.Random(1)
    learner = Learner(truth)
    for i in range(8):
        step = plan_step(batch_of(rng), truth)
        seconds, waits = times(step, truth, rng)
        if i == 7:
            at = max((key for key in seconds if key[0] == 2), key=seconds.__getitem__)
            seconds[at] *= 5
        learner.add(step, seconds, waits)
    assert learner.correction(0).slowness[2] == pytest.approx(1.0, abs=0.12)


def test_a_rank_that_becomes_slow_is_noticed_within_a_few_steps() -> None:
    measured = costs((1.0, 1.0, 1.0, 1.0))
    rng = random.Random(2)
    learner = Learner(measured)
    for i in range(12):
        step = plan_step(batch_of(rng), measured)
        learner.add(step, *times(step, costs((1.0, 0.5 if i >= 8 else 1.0, 1.0, 1.0)), rng))
    assert learner.correction(0).applied(measured).speeds[1] < 0.7


def test_what_was_not_seen_stays() -> None:
    measured = costs((1.0, 1.0, 0.5, 0.5))
    nothing = Learner(measured).correction(0.25)
    assert nothing.applied(measured) == replace(measured, seconds_per_step=0.25)
    learner = Learner(measured)
    step = plan_step([900], measured)
    ranks = step.passes[0].ranks
    learner.add(step, {(r, 0): 4.0 for r in ranks}, dict.fromkeys(((r, 0) for r in ranks), 0.0))
    unseen = set(range(4)) - set(ranks)
    assert all(learner.correction(0).slowness[r] == 1.0 for r in unseen)


def test_split_passes_do_not_count_where_waiting_is_not_known() -> None:
    measured = costs((1.0,) * 4)
    learner = Learner(measured, waits_known=False)
    step = plan_step([16000], measured)
    assert len(step.passes[0].ranks) > 1
    learner.add(step, *times(step, costs((0.5,) * 4), random.Random(0)))
    assert learner.correction(0) == Correction()


def test_passes_that_the_costs_cannot_price_do_not_count() -> None:
    measured = costs((1.0,) * 4)
    step = plan_step([16000], measured)
    for change in ({"method": "of a plan file"}, {"offload": 0.5}):
        learner = Learner(measured)
        other = replace(step, passes=tuple(replace(p, **change) for p in step.passes))
        learner.add(other, *times(step, costs((0.5,) * 4), random.Random(0)))
        assert learner.correction(0) == Correction()


def test_a_correction_survives_json() -> None:
    correction = learned(costs((1.0,) * 4), costs((1.0, 1.0, 0.5, 0.5)), steps=3)
    assert Correction(**json.loads(json.dumps(asdict(correction)))).applied(costs((1.0,) * 4)).speeds == (
        correction.applied(costs((1.0,) * 4)).speeds
    )


class Weary(Llama):
    """A model whose passes take rank 1 longer, from some moment of the training on."""

    def __init__(self, rank: int) -> None:
        super().__init__(TINY)
        self.rank, self.steps = rank, 0

    def forward(self, input_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if self.rank == 1 and self.steps:
            time.sleep(4e-4 * input_ids.numel())
        else:
            time.sleep(1e-4 * input_ids.numel())
        return super().forward(input_ids, *rest, **named)


def train_weary(world: World, folder: Path) -> tuple[float, ...]:
    torch.manual_seed(7)
    model = Weary(world.rank)
    data = [torch.tensor([random.Random(i).randrange(TINY.vocab) for _ in range(20 + i % 9)]) for i in range(90)]
    config = hm.TrainerConfig(batch_tokens=800, max_steps=12, run_dir=folder, plan_seconds=0.02)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: setattr(model, "steps", model.steps + 1))
    return hm.Trainer(model, optimizer, data, config).fit().losses


@pytest.mark.alone
def test_training_moves_work_away_from_a_rank_that_became_slow(tmp_path: Path) -> None:
    losses = run_ranks(2, train_weary, tmp_path / "run", seconds=120)
    assert losses[0] == losses[1]
    run = read_run(tmp_path / "run")
    tokens = [[sum(p.tokens(p.ranks.index(r)) for _, p in s.plan.passes_of(r)) for r in (0, 1)] for s in run.steps]
    first, last = (a / b for a, b in (tokens[0], tokens[-1]))
    assert first < 1.6 < 1.9 < last, tokens
    compared = compare_run(run)
    assert compared.last_speeds[1] < 0.65 < compared.speeds[1]
    assert f"-> {compared.last_speeds[1]:g}" in comparison_text(compared)
