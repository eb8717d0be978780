"""Corrects a cost model by what passes took: speeds of members, attention against all else, compute of split passes.

Of every pass and member in it, y = ln(computing seconds / predicted) is explained as

    y = s_r + m + m_k + g * q

s_r: slowness of member r; m: of split passes, m_k: of their method (both 0 for passes of one rank); g: growth of
attention's cost against all else, q: attention's share of what was predicted. Coefficients that minimise the squares
weighed by age and duration plus (noise / prior)^2 each, where residuals above the noise count by their size only
(Huber, Robust Estimation of a Location Parameter, 1964): one pass that something disturbed moves nothing far.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.cost.passes import Costs, load_of
from heteromesh.planner.plan import Step

HISTORY_STEPS = 12
DECAY = 0.85
"""Weight of a step relative to the one after it."""
NOISE = 0.1
"""Of ln(seconds) of one pass; the priors below are deviations of the coefficients before anything is seen."""
RANK_PRIOR, SPLIT_PRIOR, METHOD_PRIOR, ATTENTION_PRIOR = 0.25, 0.2, 0.1, 0.3
ROUNDS = 20
FURTHEST = 3.0
"""Of ln(slowness): beyond a factor of 20 it isn't a speed that is wrong."""
ALIKE = 0.93
"""Ranks at least this fast, relative to the fastest, count as equal: then shards are even."""
WORK = 0.95, 2.0
"""Parts of a sequence hardly compute faster than the whole."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What steps have shown beyond the measurement before them, as factors on its seconds."""

    slowness: tuple[float, ...] = ()
    """Per rank; empty: as measured."""
    attention: float = 1.0
    """The factor of attention, relative to all else."""
    work: Mapping[str, float] = field(default_factory=dict)
    """The factor of split passes, by method."""
    seconds_per_step: float = 0.0
    """Not a factor: what a step takes beyond its passes."""

    def applied(self, costs: Costs) -> Costs:
        """Returns the corrected cost model."""
        # what was measured beyond passes has the exposed transfers in it, but where these are counted layer by layer
        traffic = costs.traffic if costs.traffic.layer_major else StepTraffic()
        costs = replace(costs, seconds_per_step=self.seconds_per_step, traffic=traffic)
        if not self.slowness:
            return costs
        speeds = [v / slow for v, slow in zip(costs.speeds, self.slowness, strict=True)]
        top = max(speeds)
        low, high = WORK
        return replace(
            costs,
            seconds_per_token2=costs.seconds_per_token2 * self.attention / top,
            seconds_per_token=costs.seconds_per_token / top,
            seconds_per_pass=costs.seconds_per_pass / top,
            speeds=tuple(1.0 if v >= ALIKE * top else max(0.01, round(v / top, 2)) for v in speeds),
            methods=tuple(
                replace(m, work=min(high, max(low, m.work * self.work.get(m.name, 1.0)))) for m in costs.methods
            ),
        )


class _Pass(NamedTuple):
    """A member's part in a pass."""

    member: int
    method: str
    """Empty: alone."""
    share: float
    """The share of attention in what was predicted."""
    seconds: float
    """Without waiting."""
    slower: float
    """ln(seconds / predicted)."""


class _Seen(NamedTuple):
    """What a step has shown."""

    methods: tuple[str, ...]
    """That it could have used."""
    passes: tuple[_Pass, ...]


class Learner:
    """Collects what the passes of late steps took, by member, whoever else was in the job then.

    Equal steps and seconds make equal corrections, so every member can learn from what all of them committed.
    """

    def __init__(self, *, waits_known: bool = True) -> None:
        """`waits_known`: whether seconds waited for peers are told apart."""
        self._waits_known = waits_known
        self._steps: deque[_Seen] = deque(maxlen=HISTORY_STEPS)

    def add(
        self,
        members: Sequence[int],
        costs: Costs,
        step: Step,
        seconds: Mapping[tuple[int, int], float],
        waits: Mapping[tuple[int, int], float],
    ) -> None:
        """Learns from one step.

        Args:
            members: ids by the step's ranks.
            costs: of these members as measured, not corrected.
            seconds: what the step's passes took, by (rank, position in the step), as far as that is known.
            waits: of that, waited for peers.
        """
        found = []
        for position, plan in enumerate(step.passes):
            split = len(plan.ranks) > 1
            method = costs.method(plan.method) if split else None
            # a plan file may have methods that the costs don't know
            if plan.offload or (split and (method is None or not self._waits_known)):
                continue
            load = load_of([step.batch[k] for k in plan.sequences], plan.shards)
            fixed = costs.priced(plan.ranks, method, load).fixed
            for rank, (attention, rest) in zip(plan.ranks, costs.computing(plan.ranks, method, load), strict=True):
                key, predicted = (rank, position), attention + rest + fixed
                took = seconds[key] - waits[key] if key in seconds else 0.0
                if took > 0 and predicted > 0:
                    name, slower = plan.method if split else "", math.log(took / predicted)
                    found.append(_Pass(members[rank], name, attention / predicted, took, slower))
        self._steps.append(_Seen(tuple(m.name for m in costs.methods), tuple(found)))

    def correction(self, members: Sequence[int], seconds_per_step: float) -> Correction:
        """Returns what is known now, for costs of these members in rank order."""
        passes = [p for seen in self._steps for p in seen.passes]
        if not passes:
            return Correction(seconds_per_step=seconds_per_step)
        known = sorted({p.member for p in passes} | set(members))
        names = list(dict.fromkeys(name for seen in self._steps for name in seen.methods))
        rows = np.searchsorted(known, [p.member for p in passes])
        seconds, slower = np.array([p.seconds for p in passes]), np.array([p.slower for p in passes])
        ages = np.repeat(np.arange(len(self._steps))[::-1], [len(seen.passes) for seen in self._steps])
        weights = DECAY**ages * np.minimum(1.0, seconds / seconds.mean())
        columns = np.array([[p.share, p.method != "", *(p.method == name for name in names)] for p in passes], float)
        priors = [ATTENTION_PRIOR, SPLIT_PRIOR] + [METHOD_PRIOR] * len(names)
        slowness, rest = _fit(rows, columns, slower, weights, len(known), priors)
        slow = dict(zip(known, np.exp(np.clip(slowness, -FURTHEST, FURTHEST)).round(4).tolist(), strict=True))
        return Correction(
            slowness=tuple(slow[member] for member in members),
            attention=round(math.exp(rest[0]), 4),
            work={name: round(math.exp(rest[1] + own), 4) for name, own in zip(names, rest[2:], strict=True)},
            seconds_per_step=seconds_per_step,
        )

    def state(self) -> list[Any]:
        """Returns plain values from which a joining member's learner continues."""
        return [(seen.methods, [tuple(p) for p in seen.passes]) for seen in self._steps]

    def adopt(self, state: Sequence[Any]) -> None:
        """Continues where another learner was."""
        steps = [_Seen(tuple(methods), tuple(_Pass(*p) for p in passes)) for methods, passes in state]
        self._steps = deque(steps, maxlen=HISTORY_STEPS)


def _fit(
    rows: np.ndarray[Any, np.dtype[np.int64]],
    columns: Array,
    values: Array,
    weights: Array,
    count: int,
    priors: Sequence[float],
) -> tuple[Array, Array]:
    """Returns coefficients of the members (count,) and of `columns` (k,), one after the other until both stand."""
    ridge = (NOISE / np.array(priors)) ** 2
    slowness, rest = np.zeros(count), np.zeros(columns.shape[1])
    for _ in range(ROUNDS):
        off = np.abs(values - slowness[rows] - columns @ rest)
        trusted = weights * np.minimum(1.0, NOISE / np.maximum(off, 1e-12))
        sums = np.bincount(rows, trusted * (values - columns @ rest), count)
        slowness = sums / (np.bincount(rows, trusted, count) + (NOISE / RANK_PRIOR) ** 2)
        weighed = columns * trusted[:, None]
        rest = np.linalg.solve(columns.T @ weighed + np.diag(ridge), weighed.T @ (values - slowness[rows]))
    return slowness, rest
