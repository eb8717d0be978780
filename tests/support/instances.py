"""Random costs, batches and pass lists. Without torch: the planner's tests use them too."""

from __future__ import annotations

import random
from collections.abc import Sequence

from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.splitting.layout import METHODS

HEADS = 4


def random_costs(rng: random.Random, ranks: int, *, roomy: bool = False, heads: int = HEADS) -> Costs:
    """A cluster of unequal speeds and memories."""
    room = 4096 if roomy else rng.choice([48, 80, 200])
    return Costs(
        seconds_per_token2=rng.choice([1e-7, 1e-6, 1e-5]),
        seconds_per_token=1e-5,
        seconds_per_pass=rng.choice([0.0, 1e-4, 1e-3]),
        seconds_per_split_pass=rng.choice([0.0, 1e-4]),
        speeds=tuple(rng.choice([0.25, 0.5, 1.0, 1.0]) for _ in range(ranks)),
        capacity=tuple(rng.randint(room // 2, room) for _ in range(ranks)),
        methods=(
            Method(name="ulysses", bytes_per_token=1e3, scaling="fraction", heads=heads),
            Method(name="gather", bytes_per_token=rng.choice([1e2, 1e3, 1e4]), scaling="peers"),
        ),
        rate=RateByDegree({2: 1e9, 4: 5e8}),
        hosts=tuple(r // 2 for r in range(ranks)),
    )


def random_lengths(rng: random.Random, most: int) -> list[int]:
    """Heavy-tailed, from 1 token on."""
    return [min(most, max(1, int(rng.lognormvariate(2.5, 1.2)))) for _ in range(rng.randint(1, 9))]


def random_step(rng: random.Random, lengths: Sequence[int], ranks: int, heads: int = HEADS) -> Step:
    """Any pass list at all: random sets of ranks, random cuts (empty shards too), whatever the cost."""
    left, passes = list(range(len(lengths))), []
    rng.shuffle(left)
    while left:
        chosen = tuple(left.pop() for _ in range(rng.randint(1, min(3, len(left)))))
        members = tuple(sorted(rng.sample(range(ranks), rng.randint(1, ranks))))
        rows = [random_cut(rng, lengths[j], len(members)) for j in chosen]
        if any(not sum(row[i] for row in rows) for i in range(len(members))):
            members, rows = members[:1], [[lengths[j]] for j in chosen]  # a member without any token is no member
        method = "local"
        if len(members) > 1:
            method = rng.choice(METHODS[1:] if len(members) <= heads else [m for m in METHODS[1:] if m != "ulysses"])
        shards = tuple(tuple(row[i] for row in rows) for i in range(len(members)))
        passes.append(Pass(ranks=members, method=method, sequences=chosen, shards=shards, seconds=0.0))
    return Step(passes=tuple(passes), seconds=0, bound_seconds=0, gap=0, solve_seconds=0, batch=tuple(lengths))


def random_cut(rng: random.Random, length: int, parts: int) -> list[int]:
    """`parts` counts, zero among them now and then, that add up to `length`."""
    cuts = sorted(rng.randint(0, length) for _ in range(parts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
