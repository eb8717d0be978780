"""The bound is below every pass list: brute force on tiny instances, random pass lists, planned steps."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heteromesh.planner.cluster.links import Links
from heteromesh.planner.cost.passes import LOCAL, Costs, Method, RateByDegree
from heteromesh.planner.cost.shards import make_pass
from heteromesh.planner.model.attention import AttentionShape, ModelAttention, split_methods
from heteromesh.planner.plan import Pass
from heteromesh.planner.sequences.batch import largest
from heteromesh.planner.sequences.bound import bound_seconds
from heteromesh.planner.sequences.step import plan_step, step_seconds

METHODS = (
    (Method(name="gather", bytes_per_token=3.0, scaling="peers"),),
    (Method(name="ulysses", bytes_per_token=2.0, scaling="fraction", heads=3),),
    (
        Method(name="ulysses", bytes_per_token=2.0, scaling="fraction", heads=2),
        Method(name="ring", bytes_per_token=5.0),
    ),
    split_methods(
        ModelAttention(calls=1, shape=AttentionShape(heads=4, kv_heads=2, head_dim=1, itemsize=1)), (0, 0, 1, 1), 50.0
    ),
)


def random_costs(rng: random.Random, ranks: int) -> Costs:
    if rng.random() < 0.5:
        rate = RateByDegree({2: rng.choice([5.0, 50.0]), 3: rng.choice([3.0, 80.0])})
        hosts = (0,) * ranks
    else:
        hosts = tuple(r // 2 for r in range(ranks))
        n = max(hosts) + 1
        fast, slow = (rng.choice([5.0, 40.0]) for _ in range(2))
        rate = Links(hosts=hosts, link=(fast,) * n, fabrics=("a",) * n, fabric_nics=(slow,) * n, ethernet=(slow,) * n)
    equal = rng.random() < 0.3
    return Costs(
        seconds_per_token2=rng.choice([0.0, 0.002, 0.02]),
        seconds_per_token=rng.choice([0.05, 0.2]),
        seconds_per_pass=rng.choice([0.0, 0.3, 2.0]),
        seconds_per_split_pass=rng.choice([0.0, 0.4]),
        seconds_per_round=rng.choice([0.0, 0.02]),
        seconds_per_tile=rng.choice([0.0, 0.02]),
        seconds_per_step=rng.choice([0.0, 1.0]),
        speeds=tuple(1.0 if equal else rng.choice([1.0, 0.5, 0.3]) for _ in range(ranks)),
        capacity=tuple(20 if equal else rng.choice([9, 20, 31]) for _ in range(ranks)),
        methods=rng.choice(METHODS),
        rate=rate,
        hosts=hosts,
    )


def partitions(items: list[int]):
    if not items:
        yield []
        return
    head, rest = items[0], items[1:]
    for part in partitions(rest):
        yield [[head], *part]
        for i in range(len(part)):
            yield [*part[:i], [head, *part[i]], *part[i + 1 :]]


def possible_passes(sequences: list[int], batch: list[int], costs: Costs) -> list[Pass]:
    tokens = sum(batch[k] for k in sequences)
    made = []
    for degree in range(1, costs.ranks + 1):
        for ranks in itertools.combinations(range(costs.ranks), degree):
            if sum(costs.capacity[r] for r in ranks) < tokens:
                continue
            names = [LOCAL]
            if degree > 1:
                fitting = [m for m in costs.methods if m.fits(degree)]
                names = [m.name for m in fitting if sum(costs.capacity_for(ranks, m, tokens)) >= tokens]
            made += [make_pass(ranks, name, sequences, batch, costs) for name in names]
    return made


def optimum(batch: list[int], costs: Costs) -> float:
    """Least seconds over all pass lists with shards as the planner deals them."""
    best = math.inf
    for part in partitions(list(range(len(batch)))):
        for passes in itertools.product(*(possible_passes(group, batch, costs) for group in part)):
            busy = [sum(p.seconds for p in passes if r in p.ranks) for r in range(costs.ranks)]
            if max(busy) + costs.seconds_per_step >= best:
                continue
            best = min(best, *(step_seconds(order, costs) for order in itertools.permutations(passes)))
    return best


def fitting_batch(rng: random.Random, costs: Costs, count: int) -> list[int]:
    most, _ = largest(costs)
    return [rng.randint(1, most) for _ in range(count)]


def test_bound_and_plan_against_brute_force():
    ratios, gaps = [], []
    for seed in range(40):
        rng = random.Random(seed)
        costs = random_costs(rng, rng.choice([1, 2, 3, 3]))
        batch = fitting_batch(rng, costs, rng.choice([1, 2, 3, 4] if costs.ranks < 3 else [1, 2, 3]))
        best, step = optimum(batch, costs), plan_step(batch, costs)
        assert step.bound_seconds <= best * (1 + 1e-9), (seed, batch, costs)
        assert best <= step.seconds * (1 + 1e-9), (seed, batch, costs)
        ratios.append(step.seconds / best)
        gaps.append(best / step.bound_seconds)
    assert sum(ratios) / len(ratios) < 1.05
    assert sum(gaps) / len(gaps) < 1.4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_bound_is_below_random_pass_lists_with_any_shards(seed):
    rng = random.Random(seed)
    costs = random_costs(rng, rng.randint(1, 6))
    batch = fitting_batch(rng, costs, rng.randint(1, 12))
    passes, left = [], list(range(len(batch)))
    while left:
        group = [left.pop() for _ in range(min(len(left), rng.randint(1, 3)))]
        options = possible_passes(group, batch, costs)
        if not options:
            left += group[1:]
            group = group[:1]
            options = possible_passes(group, batch, costs)
        p = rng.choice(options)
        passes.append(shuffled(p, batch, costs, rng))
    rng.shuffle(passes)
    assert bound_seconds(batch, costs) <= step_seconds(passes, costs)


def shuffled(p: Pass, batch: list[int], costs: Costs, rng: random.Random) -> Pass:
    """The same pass with tokens moved between its ranks, within memory."""
    rows = [list(row) for row in p.shards]
    for _ in range(20):
        a, b, j = rng.randrange(len(rows)), rng.randrange(len(rows)), rng.randrange(len(rows[0]))
        n = min(rng.randint(0, 4), rows[a][j], costs.capacity[p.ranks[b]] - sum(rows[b]))
        if a != b and n > 0:
            rows[a][j] -= n
            rows[b][j] += n
    shards = tuple(tuple(row) for row in rows)
    seconds = costs.pass_seconds(p.ranks, p.method, [batch[k] for k in p.sequences], shards)
    return Pass(ranks=p.ranks, method=p.method, sequences=p.sequences, shards=shards, seconds=seconds)


def even(ranks: int, **changes) -> Costs:
    base = {
        "seconds_per_token2": 0.0,
        "seconds_per_token": 1.0,
        "seconds_per_pass": 10.0,
        "speeds": (1.0,) * ranks,
        "capacity": (100,) * ranks,
        "methods": (Method(name="ring", bytes_per_token=1.0),),
        "rate": RateByDegree({2: 1.0}),
        "hosts": (0,) * ranks,
    }
    return Costs(**(base | changes))


def test_bound_is_exact_for_one_sequence_on_one_rank():
    assert bound_seconds([50], even(1)) == pytest.approx(60.0)


def test_bound_knows_that_passes_are_whole():
    # 150 tokens on one rank of 100 need two passes: 150 + 20; a fraction of a pass would say 150 + 15.
    assert bound_seconds([50, 50, 50], even(1)) == pytest.approx(170.0, rel=0.02)


def test_bound_scales_with_power():
    fast = bound_seconds([50] * 8, even(2, seconds_per_pass=0.0))
    slow = bound_seconds([50] * 8, even(2, seconds_per_pass=0.0, speeds=(1.0, 0.5)))
    assert fast == pytest.approx(200.0)
    assert slow == pytest.approx(400 / 1.5)


def test_bound_is_below_a_split_over_the_longest_sequences_own_best_pass():
    # 300 tokens fit three ranks only: 100 compute + 100 exchange + 10.
    assert bound_seconds([300], even(3)) == pytest.approx(210.0)
