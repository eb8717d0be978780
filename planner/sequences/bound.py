"""A lower bound on a step's seconds, valid for every pass list, in milliseconds.

Fix the time T that passes may take. A rank in k passes spends k * c seconds on their fixed cost and holds at most
k * capacity tokens over the step; what is left of T, T - k * c, has to take the compute and exchange of its tokens. So
T is possible only if ranks can be divided by their number of passes k such that all tokens find room and time:

    y[g,k]    >= 0  ranks of class g (equal speed v, equal capacity) in k passes,  sum_k y[g,k] <= size of g
    x[q,g,k]  >= 0  tokens of bucket q on them,                                    sum_gk x[q,g,k] = tokens of q
    sum_q x[q,g,k]                                 <= k * capacity_g * y[g,k]
    sum_q x[q,g,k] * (work_q / v_g + wire_q) + e[g,k] / v_g <= (T - k * c) * y[g,k]

work_q = a * s + b is the compute of a token of a sequence of s tokens, wire_q its exchange at the best rate of any
degree at which a pass with that sequence fits memory and T. A bucket takes the smallest work and wire of its
sequences; the excess is the variable e, a commodity of time without tokens, so that all work is kept. The linear
relaxation drops whole ranks and waiting: every pass list that takes T satisfies it, so an infeasible T is below the
optimum; sum_gk k * y[g,k] >= ceil(tokens / largest capacity) keeps the whole passes of all ranks together.
Bisection on T then ends at a bound. It generalises the LP over degrees of FlexSP's classes (arXiv 2412.01523, section
4.1) to ranks with unequal numbers of passes. Methods that split attention by heads part pairs from tokens; all of a
sequence's attention is then part of e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heteromesh.planner.cost.envelope import envelope
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.solver import Floats, maximise_first

BUCKETS = 10
CLASSES = 6
WHOLE = 12
"""Up to this many passes per rank their number is whole in the bound; beyond, a fraction costs little tightness."""
ROUNDS = 8
SLACK = 1e-6
FIRST_STEP = 0.002


def bound_seconds(lengths: Sequence[int], costs: Costs) -> float:
    """Returns seconds that no pass list over these lengths (tokens) goes below, transfers and fixed cost of the step
    included.
    """
    return with_step(passes_bound(lengths, costs), costs)


def with_step(passes: float, costs: Costs) -> float:
    """Returns what a step takes, at least, whose passes take so long at least."""
    return costs.traffic.at_least(passes) + costs.seconds_per_step


def passes_bound(lengths: Sequence[int], costs: Costs) -> float:
    """Returns seconds before which the passes of no pass list over these lengths end.

    `costs.rate` must be as planner/cost/envelope.py says.
    """
    instance = _Instance(lengths, costs)
    # Sums in another order differ in their last bits; the bound must stay below.
    return _search(instance, instance.simple()) * (1 - 1e-9)


def _search(instance: _Instance, low: float) -> float:
    """Returns the largest T shown infeasible by ROUNDS linear programs; `low` is known to be a bound."""
    high, step = math.inf, FIRST_STEP
    share_low = share_high = math.nan
    for _ in range(ROUNDS):
        if math.isinf(high):
            middle = low * (1 + step)
        elif math.isnan(share_low):
            return low
        else:
            # The share grows almost linearly with T; aiming a little low leaves most guesses infeasible, so bounds.
            guess = low + (high - low) * (1 - share_low) / (share_high - share_low)
            middle = guess - 0.02 * (high - low)
        share = instance.share(middle)
        if math.isinf(share):
            return low
        if share < 1 - SLACK:
            low, share_low, step = middle, share, step * 10
        else:
            high, share_high = middle, share
    return low


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What has to be done, at a given T."""

    amount: Floats
    """Per bucket: tokens."""
    work: Floats
    """Per bucket: compute of a token at speed 1, at least."""
    exposed: Floats
    """Per bucket: exchange seconds of a token, at least."""
    excess: float
    """Work beyond those minima."""
    total: float
    """All work."""


class _Instance:
    def __init__(self, lengths: Sequence[int], costs: Costs) -> None:
        self.costs = costs
        self.best = envelope(costs)
        self.lengths, counts = np.unique(np.asarray(lengths, float), return_counts=True)
        self.counts = counts.astype(float)
        self.tokens = float(self.counts @ self.lengths)
        self.own = self.best.own_seconds(costs, self.lengths)
        self.heads = costs.ranks > 1 and any(m.heads for m in costs.methods)
        self.classes = _classes(costs)
        self.fewest = math.ceil(self.tokens / max(costs.capacity))
        """Passes of all ranks together, at least."""

    def simple(self) -> float:
        """Returns the larger of two simple bounds: a sequence's own best pass; all work and the fewest passes."""
        alone = float(self.own.min(axis=1).max())
        todo = self.buckets(math.inf)
        work = float(todo.amount @ (todo.work + self.best.slowest * todo.exposed)) + todo.excess
        # c is paid by whole passes: a rank in k of them holds k * capacity tokens and loses v * k * c of its power
        price = self.costs.seconds_per_pass * min(
            v / capacity for v, capacity in zip(self.costs.speeds, self.costs.capacity, strict=True)
        )
        whole = self.costs.seconds_per_pass * self.best.slowest * self.fewest
        return max(alone, (work + max(price * self.tokens, whole)) / sum(self.costs.speeds))

    def buckets(self, limit: float) -> _Tokens:
        """Returns the work where no pass takes longer than `limit`."""
        costs, s = self.costs, self.lengths
        exposed = np.broadcast_to(self.best.exposed, self.own.shape)
        possible = np.isfinite(self.own) & (self.own <= limit)
        exposed = np.where(possible, exposed, math.inf).min(axis=1)
        must_split = ~possible[:, 0]
        exposed = exposed + must_split * (costs.seconds_per_split_pass / max(costs.capacity))
        least_work = float(self.best.work.min())
        work = (costs.seconds_per_token2 * s + costs.seconds_per_token) * least_work
        amount = self.counts * s
        least = np.full_like(work, costs.seconds_per_token * least_work) if self.heads else work
        cuts = np.searchsorted(np.cumsum(amount * work), np.linspace(0, amount @ work, BUCKETS + 1)[1:-1])
        at = np.unique(np.concatenate(([0], cuts[cuts < len(s)])))
        low_work, low_wire = np.minimum.reduceat(least, at), np.minimum.reduceat(exposed, at)
        tokens = np.add.reduceat(amount, at)
        full = float(amount @ (work + self.best.slowest * exposed))
        kept = float(tokens @ (low_work + self.best.slowest * low_wire))
        return _Tokens(tokens, low_work, low_wire, max(full - kept, 0.0) * (1 - 1e-9), full)

    def share(self, limit: float) -> float:
        """Returns the largest share of the work that fits into `limit` seconds, by the relaxation above; at most 2."""
        if bool((self.own.min(axis=1) > limit).any()):
            return 0.0
        todo = self.buckets(limit)
        kinds = [(g, k) for g, (_, capacity, _) in enumerate(self.classes) for k in self._passes(limit, capacity)]
        return self._solve(kinds, todo, limit) if kinds else 0.0

    def _passes(self, limit: float, capacity: float) -> list[int]:
        """Returns numbers of passes a rank may have; 0 stands for any number, whole or not."""
        c = self.costs.seconds_per_pass
        most = min(limit / c if c else math.inf, math.ceil(self.tokens / capacity))
        return list(range(1, int(most) + 1)) if most < WHOLE + 1 else [0]

    def _solve(self, kinds: list[tuple[int, int]], todo: _Tokens, limit: float) -> float:
        """Returns the linear program: columns share, then per kind [ranks, passes, e, x of every bucket]."""
        c, classes, n = self.costs.seconds_per_pass, self.classes, len(todo.amount)
        width = n + 3
        # Per kind a row for memory and one for time; then one per class, per bucket, for the excess, for all passes.
        matrix = np.zeros((2 * len(kinds) + len(classes) + n + 2, 1 + len(kinds) * width))
        upper = np.zeros(len(matrix))
        lower = np.full(len(matrix), -math.inf)
        cols = np.full(matrix.shape[1], math.inf)
        cols[0] = 2.0
        first, last = 2 * len(kinds) + len(classes), len(matrix) - 2
        for i, (g, k) in enumerate(kinds):
            speed, capacity, _ = classes[g]
            at = 1 + i * width
            ranks, passes, excess, x = at, at + 1, at + 2, slice(at + 3, at + width)
            if k:
                cols[passes] = 0.0
            # Tokens in units of a rank's room keep the coefficients near 1.
            matrix[2 * i, x], matrix[2 * i, ranks], matrix[2 * i, passes] = 1.0, -k, -1.0
            matrix[2 * i + 1, x] = (todo.work / speed + todo.exposed) * capacity / limit
            matrix[2 * i + 1, excess] = 1.0
            matrix[2 * i + 1, ranks], matrix[2 * i + 1, passes] = -(1 - k * c / limit), c / limit
            matrix[2 * len(kinds) + g, ranks] = 1.0
            matrix[first : first + n, x] = np.diag(capacity / todo.amount)
            matrix[last, excess] = limit * speed
            matrix[last + 1, ranks], matrix[last + 1, passes] = k, 1.0
        for g, (_, _, count) in enumerate(classes):
            upper[2 * len(kinds) + g] = count
        matrix[first : first + n, 0] = -1.0
        lower[first:] = 0.0
        lower[last + 1], upper[last + 1] = self.fewest, math.inf
        # In units of all work, so that an excess near 0 does no harm.
        matrix[last] /= todo.total
        matrix[last, 0] = -todo.excess / todo.total
        return maximise_first(matrix, lower, upper, cols)


def _classes(costs: Costs) -> list[tuple[float, float, int]]:
    """Returns (speed, capacity, ranks) of every class; many different ones are merged, each merged class taking its
    best.
    """
    ranks = sorted(zip(costs.speeds, costs.capacity, strict=True))
    unique = sorted(set(ranks))
    size = math.ceil(len(unique) / CLASSES)
    classes = []
    for i in range(0, len(unique), size):
        group = unique[i : i + size]
        classes.append((max(v for v, _ in group), float(max(n for _, n in group)), sum(r in group for r in ranks)))
    return classes
