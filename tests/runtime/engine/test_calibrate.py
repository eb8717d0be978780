"""Measured costs: the fit, and that the bytes a plan predicts are those that are sent."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.planner.cost.fit import fit_jointly, fit_nonnegative
from heteromesh.planner.plan import Pass
from heteromesh.planner.sequences.static import even_shards
from heteromesh.planner.splitting.traffic import AGREEMENT_BYTES, pass_bytes
from heteromesh.runtime.engine.calibrate import LONGEST, RUN_SECONDS, SHORTEST, Calibration
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from llama import Llama
from ranks import World, run_ranks
from steps import TINY


def test_fit_finds_exact_constants() -> None:
    rows = np.array([[100.0**2, 100, 1], [50.0**2, 50, 1], [10 * 8.0**2, 80, 1], [8.0**2, 8, 1]])
    truth = np.array([3e-6, 2e-5, 1e-3])
    assert fit_nonnegative(rows, rows @ truth) == pytest.approx(truth)


@pytest.mark.parametrize("seed", range(4))
def test_long_passes_of_a_fast_rank_tell_of_slow_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, speeds = np.array([1.5e-7, 1e-3, 2e-3]), (0.2, 1.0, 0.5, 1.0)
    rows, seconds = [], []
    for v in speeds:
        own = int(5000 * v)
        packs = [(own,), (own // 2,), (64,) * (own // 128), (64,)]
        rows.append(np.array([[sum(s * s for s in p), sum(p), 1.0] for p in packs]))
        seconds.append((rows[-1] @ truth / v * rng.lognormal(0, 0.03, len(packs))).tolist())
    found, relative = fit_jointly(rows, seconds)
    assert relative == pytest.approx(speeds, rel=0.1)
    assert relative[1] == relative[3] == 1.0
    assert found[0] == pytest.approx(truth[0], rel=0.2)
    assert found[1] == pytest.approx(truth[1], rel=0.1)


def test_fit_is_never_negative() -> None:
    rows = np.array([[100.0, 1], [10, 1], [1, 1]])
    falling = fit_nonnegative(rows, np.array([1.0, 2.0, 3.0]))
    assert (falling >= 0).all()
    assert falling[0] == 0


def test_short_passes_do_not_make_pairs_cost_what_only_tokens_can() -> None:
    """Noise made all of 80 tokens' cost quadratic: a sequence of 1024 was predicted to take 140 s, and took 15."""
    packs = [(80,), (40,), (32, 32), (32,)]
    rows = np.array([[sum(s * s for s in p), sum(p), 1.0] for p in packs])
    seconds = rows @ np.array([1.4e-4, 0.0, 1.0])
    assert fit_nonnegative(rows, seconds)[1] == 0
    found = fit_nonnegative(rows, seconds, most=1e-3)
    assert found[0] == pytest.approx(1e-3 * found[1])
    assert found[1] > 0

    def error(coefficients: np.ndarray[Any, Any]) -> float:
        return float(((rows @ coefficients / seconds - 1) ** 2).sum())

    for b, c in itertools.product(np.linspace(0, 0.02, 21), np.linspace(0, 2, 21)):
        for a in (0.0, 0.5e-3 * b, 1e-3 * b):
            assert error(found) <= error(np.array([a, b, c])) + 1e-12


def counted_and_predicted(world: World, recompute: bool) -> list[tuple[str, float, float, float]]:
    """Bytes of a pass over all ranks, for each method, beside what the exact and the linear prediction say."""
    config = replace(TINY, kv_heads=max(2, world.size))
    executor = StepExecutor(Llama(config), world, checkpoint_activations=recompute)
    calibration = Calibration(executor, Reader([torch.arange(61)]).sample_input, 48)
    shape = calibration.attention_shape()
    assert shape is not None
    assert (shape.calls, shape.heads, shape.kv_heads, shape.dim, shape.itemsize) == (2, 4, config.kv_heads, 8, 4)
    rows = []
    hosts = tuple(r // 2 for r in range(world.size))
    for method in shape.methods(executor.forwards, hosts):
        length = 12 * world.size
        team = tuple(range(world.size))
        plan = Pass(ranks=team, method=method.name, sequences=(0,), shards=even_shards([length], world.size), seconds=0)
        context = prepare_pass(plan, [length], world, (1.0,) * world.size)
        batch = Reader([torch.arange(length) % 61]).pass_input(context.layout, [0], world.rank)
        executor.forward_backward(context, batch, 1)  # the first one also compares what the ranks hold
        before = world.recorder.exchanged_bytes
        executor.forward_backward(context, batch, 1)
        sent = world.recorder.exchanged_bytes - before
        attention = shape.attention(executor.forwards)
        exact = pass_bytes(method.name, [length], plan.shards, (1.0,) * world.size, attention)[world.rank]
        agreement = AGREEMENT_BYTES * (world.size - 1)
        rows.append((method.name, sent, exact - agreement, method.bytes_at(world.size) * plan.tokens(world.rank)))
    return rows


@pytest.mark.parametrize(("ranks", "recompute"), [(2, False), (2, True), (4, False)])
def test_predicted_bytes_are_the_sent_ones(ranks: int, recompute: bool) -> None:
    everyone = run_ranks(ranks, counted_and_predicted, recompute)
    for method in zip(*everyone, strict=True):
        assert all(sent == exact for _, sent, exact, _ in method), method
        # the linear prediction is that of the average rank
        assert sum(sent for _, sent, _, _ in method) == pytest.approx(sum(mean for _, _, _, mean in method)), method
    names = {name for name, _, _, _ in everyone[0]}
    assert names >= {"ulysses", "gather", "ring", "trimmed_ring", "bidirectional_ring", "token_ring"}
    assert ("ulysses_ring:2" in names) == (ranks == 4)


def measured(world: World) -> tuple[float, tuple[float, ...], tuple[int, ...]]:
    costs = Calibration(StepExecutor(Llama(TINY), world), Reader([torch.arange(61)]).sample_input, 256).measure()
    assert costs.seconds_per_token2 + costs.seconds_per_token > 0
    seconds = costs.pass_seconds((0,), "local", [256], [[256]])
    return seconds, costs.speeds, costs.capacity


def test_measured_costs_are_the_same_on_every_rank() -> None:
    rows = run_ranks(2, measured)
    assert rows[0] == rows[1]
    seconds, speeds, capacity = rows[0]
    assert 0 < seconds < 60, "256 tokens of a tiny model"
    assert all(0 < v <= 1 for v in speeds)
    assert max(speeds) > 0.5
    assert min(capacity) > 256


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("slowness", [1e-3, 0.3, 2.0, 5.0, 100.0])
def test_a_slow_device_measures_shorter_passes(power: int, slowness: float) -> None:
    # seconds of this rank at the longest pass; the other one is done at once
    tried: list[float] = []

    def seconds(length: int) -> float:
        tried.append(slowness * (length / LONGEST) ** power)
        return tried[-1]

    world = SimpleNamespace(rank=0, gather=lambda mine: [mine, LONGEST])
    calibration = Calibration(SimpleNamespace(world=world), None, 100_000)
    calibration._act = lambda plan, lengths: lengths[0]
    calibration._once = seconds
    length = calibration._affordable()
    took = slowness * (length / LONGEST) ** power
    assert SHORTEST <= length <= LONGEST
    assert took <= RUN_SECONDS or length == SHORTEST
    assert length == LONGEST or 4 * took > RUN_SECONDS  # no shorter than need be
    assert sum(tried) <= 2 * RUN_SECONDS or length == SHORTEST


def test_without_a_limit_the_longest_pass_is_measured_however_long_it_takes() -> None:
    calibration = Calibration(
        SimpleNamespace(world=SimpleNamespace(rank=0, gather=lambda mine: [mine])),
        None,
        100_000,
        run_seconds=math.inf,
    )
    calibration._act = lambda plan, lengths: lengths[0]
    calibration._once = lambda length: 1e6 * length
    assert calibration._affordable() == LONGEST
