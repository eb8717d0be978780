"""Chooses who takes part and how weights are held, by what a whole step takes; best first, with a bound.

Hosts that are alike form a class; a candidate is a number of working hosts per class, with a layout. Its seconds are
passes (plan_step on the working ranks), exposed gathers and gradient sums, and the optimizer. Candidates wait by what
they take at least and are looked at more closely when nothing else promises as much:

    all work over the sum of speeds; plus the layout's traffic; the layout itself, with the bound of passes in the
    memory that it leaves; planned, those first that need to split the least

The search ends when the least of what is left is no better than the best plan (PROVED): every candidate was planned or
takes at least as long, with the ownership that planner/ownership/weights.py gives it; a time limit in processor
seconds may end it before, and the gap says what is left. Parts of hosts are all listed on small clusters; on others the
neighbours of the best plan, with a device more or less on a host, join the candidates.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from heteromesh.errors import UserError
from heteromesh.planner.cost.analytic import analytic_costs
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.participation.layout import (
    GROUPED,
    SHARDED,
    Setting,
    WeightLayout,
)
from heteromesh.planner.participation.replicated import recomputed, replicated, sharded_optimizer
from heteromesh.planner.participation.sharded import Part, groupings, sharded, sharded_least
from heteromesh.planner.plan import Step
from heteromesh.planner.sequences.bound import passes_bound, with_step
from heteromesh.planner.sequences.step import plan_step

PROVED = 0.002
"""A candidate must promise this much (relative) to be looked at after a plan was found."""
PARTS = 100
"""Numbers of devices per host that are listed at most."""
SUBSETS = 20_000
"""Numbers of hosts per class that are listed at most; beyond, those next to all hosts and to single classes."""
LOOKING = 0.5
"""Of the time limit, for looking at further sets of ranks; then those that were looked at are planned."""
PREFERENCE = 0.005
"""A layout that the Trainer executes is taken where it is no more than this (relative) slower."""
SPLITTING = 0.5
"""Of what candidates take at least: what they may take beyond it, were all sequences too long for most ranks."""
ROUNDS = 4
"""Of planning with room for the layer inputs that the plan before gave each rank."""
Counts = tuple[int, ...]
"""Devices of each host of a class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """A layout with a step that it can run."""

    layout: WeightLayout
    costs: Costs
    """Of the working ranks, numbered from 0."""
    step: Step
    """Of the same."""

    @property
    def seconds(self) -> float:
        return self.step.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Participation:
    """What was chosen, and what is proved about it."""

    best: PlannedLayout
    bound: float
    """Every candidate that was not planned takes at least this; no more than the best's seconds."""
    proved: bool
    """Whether the search came to its end."""
    tried: int
    """Candidates that were planned."""

    @property
    def gap(self) -> float:
        return self.best.seconds / self.bound - 1 if self.bound else 0.0


@dataclass(slots=True)
class _Candidate:
    ranks: tuple[int, ...]
    kind: str = ""
    """Empty: all layouts of these ranks."""
    checkpointing: bool = False
    part: Part | None = None
    layout: WeightLayout | None = None
    bound: float = 0.0
    """Once the layout is made."""


@dataclass(slots=True)
class ParticipationSearch:
    """Candidates by what they take at least."""

    setting: Setting
    plan_seconds: float
    seconds: float
    """Processor time."""
    least_tried: int = 2
    """Candidates that are planned whatever time that takes."""
    executed: bool = False
    """Whether only layouts count that the Trainer executes."""
    seen: set[tuple[int, ...]] = field(default_factory=set)
    heap: list[tuple[float, int, _Candidate]] = field(default_factory=list)
    """By what they take at least: those without a layout."""
    ready: list[tuple[float, int, _Candidate]] = field(default_factory=list)
    """By what they promise: those with a layout, to be planned."""
    tickets: Iterator[int] = field(default_factory=itertools.count)
    work: dict[bool, float] = field(default_factory=dict)
    """Seconds of all work at the reference speed, without and with recomputation."""
    tried: int = 0
    best: PlannedLayout | None = None

    def run(self, subsets: Iterable[Sequence[int]]) -> Participation | None:
        """Returns the best of these sets of working ranks; None where none can hold the model."""
        began = time.thread_time()
        for ranks in subsets:
            self._add(tuple(ranks))
        proved = True
        while self.heap or self.ready:
            if self.best is not None and self._least() >= self.best.seconds * (1 - PROVED):
                break
            if time.thread_time() - began > self.seconds and self.tried >= self.least_tried:
                proved = False
                break
            waiting = self._waiting((time.thread_time() - began) / self.seconds if self.seconds else math.inf)
            if waiting is None:
                self._plan(heapq.heappop(self.ready)[-1])
            else:
                self._look_closer(*waiting)
        if self.best is None:
            return None
        least = min(self._least(), self.best.seconds)
        return Participation(best=self.best, bound=least, proved=proved, tried=self.tried)

    def _waiting(self, spent: float) -> tuple[float, _Candidate] | None:
        """Returns the candidate to look at next, with its bound; None: plan what promises most.

        spent: of the time limit. After LOOKING of it no further sets of ranks are looked at, after twice of it none.
        """
        if not self.heap or (self.ready and (self.heap[0][0] >= self._promise() or spent > 2)):
            return None
        if spent <= LOOKING or not self.ready:
            bound, _, candidate = heapq.heappop(self.heap)
            return bound, candidate
        known = [entry for entry in self.heap if entry[-1].kind and entry[0] < self._promise()]
        if not known:
            return None
        self.heap.remove(min(known))
        heapq.heapify(self.heap)
        bound, _, candidate = min(known)
        return bound, candidate

    def _least(self) -> float:
        """Returns what no candidate left goes below."""
        return min(self.heap[0][0] if self.heap else math.inf, min((c.bound for *_, c in self.ready), default=math.inf))

    def _promise(self) -> float:
        """Returns the seconds of the best plan, or those that the most promising candidate may come to."""
        best = self.best.seconds if self.best is not None else math.inf
        return min(best, self.ready[0][0] if self.ready else math.inf)

    def _look_closer(self, bound: float, candidate: _Candidate) -> None:
        if candidate.kind:
            made = self._made(candidate)
            if made is not None:
                made.bound = max(made.bound, bound)
                estimate = made.bound * (1 + SPLITTING * self._split_share(made))
                heapq.heappush(self.ready, (estimate, next(self.tickets), made))
            return
        for less, closer in self._layouts(candidate.ranks):
            heapq.heappush(self.heap, (max(less, bound), next(self.tickets), closer))

    def _split_share(self, candidate: _Candidate) -> float:
        """Returns the share of the work in sequences that don't fit most of the working ranks whole."""
        layout = candidate.layout
        assert layout is not None
        capacity = sorted(layout.capacity(self.setting, layout.expected(self.setting)).values())
        middle = capacity[len(capacity) // 2]
        return sum(n for n in self.setting.batch if n > middle) / self.setting.tokens

    def _add(self, ranks: tuple[int, ...]) -> None:
        if ranks and ranks not in self.seen:
            self.seen.add(ranks)
            heapq.heappush(
                self.heap, (self._ideal(ranks, bool(self.setting.checkpointing)), next(self.tickets), _Candidate(ranks))
            )

    def _ideal(self, ranks: tuple[int, ...], checkpointing: bool) -> float:
        """Returns the seconds of all work at the sum of speeds: no passes end before."""
        if checkpointing not in self.work:
            cluster, batch = self.setting.cluster, self.setting.batch
            capacity = (self.setting.tokens,) * cluster.ranks
            costs = self.setting.adjust(
                analytic_costs(cluster, self.setting.model, checkpointing=checkpointing, capacity=capacity)
            )
            work = costs.seconds_per_token2 * sum(n * n for n in batch) + costs.seconds_per_token * sum(batch)
            self.work[checkpointing] = work * min([1.0, *(m.work for m in costs.methods)])
        return self.work[checkpointing] / sum(self.setting.speeds[r] for r in ranks)

    def _made(self, candidate: _Candidate) -> _Candidate | None:
        """Returns the candidate with its layout, and what that takes at least; None where it does not fit."""
        layout, setting = candidate.layout, self.setting
        if candidate.part is not None:
            layout = sharded(setting, candidate.part, self._ideal(candidate.ranks, True))
        if layout is None:
            return None
        capacity = layout.capacity(setting, layout.expected(setting))
        if min(capacity.values()) < 1:
            return None
        costs = layout.costs(setting, [capacity[r] for r in layout.ranks])
        costs = costs.offloading() or costs
        if max(setting.batch) > sum(costs.capacity):
            return None
        bound = with_step(passes_bound(setting.batch, costs), costs)
        return replace(candidate, layout=layout, bound=bound)

    def _layouts(self, ranks: tuple[int, ...]) -> list[tuple[float, _Candidate]]:
        found = []
        checkpointing = self.setting.checkpointing
        for layout in filter(None, (replicated(self.setting, ranks), sharded_optimizer(self.setting, ranks))):
            for again in (False, True) if checkpointing is None else (checkpointing,):
                own = recomputed(self.setting, layout) if again else layout
                if min(own.capacity(self.setting, own.expected(self.setting)).values()) > 0:
                    found.append(_Candidate(ranks, own.kind, again, None, own))
        if not self.executed:
            found += [_Candidate(ranks, kind, True, part) for kind, part in self._parts(ranks)]
        bounded = [(self._bound(candidate), candidate) for candidate in found]
        return [(seconds, candidate) for seconds, candidate in bounded if seconds is not None]

    def _parts(self, ranks: tuple[int, ...]) -> list[tuple[str, Part]]:
        """Returns the ways to shard weights with these working ranks."""
        parts = [(SHARDED, Part(ranks))]
        others = self._idle_hosts(ranks)
        if others:
            parts.append((SHARDED, Part(ranks, others)))
        return parts + [(GROUPED, Part(ranks, (), grouping)) for grouping in groupings(self.setting, ranks)]

    def _idle_hosts(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the ranks of hosts of which none works."""
        working = {self.setting.cluster.rank_hosts[r] for r in ranks}
        return tuple(r for h, own in enumerate(self.setting.host_ranks) if h not in working for r in own)

    def _bound(self, candidate: _Candidate) -> float | None:
        """Returns what the candidate takes at least; None where memory does not hold it."""
        passes = self._ideal(candidate.ranks, candidate.checkpointing)
        if candidate.part is not None:
            return sharded_least(self.setting, candidate.part, passes)
        assert candidate.layout is not None
        return candidate.layout.traffic.at_least(passes) + candidate.layout.update_seconds

    def _plan(self, candidate: _Candidate) -> None:
        layout = candidate.layout
        assert layout is not None
        if self.best is not None and candidate.bound >= self.best.seconds * (1 - PROVED):
            return
        self.tried += 1
        planned = plan_layout(self.setting, layout, self.setting.batch, self.plan_seconds)
        if planned is None or (self.best is not None and _preferred(planned) >= _preferred(self.best)):
            return
        self.best = planned
        for ranks in self._neighbours(set(layout.ranks)):
            self._add(ranks)

    def _neighbours(self, ranks: set[int]) -> Iterator[tuple[int, ...]]:
        """Yields these ranks with one more and one less of each class of hosts, by how many of a host's work."""
        for hosts in self.setting.classes:
            counts = {len(ranks.intersection(self.setting.host_ranks[h])): self.setting.host_ranks[h] for h in hosts}
            for count, own in counts.items():
                if count < len(own):
                    yield tuple(sorted(ranks | {next(r for r in own if r not in ranks)}))
                if count:
                    yield tuple(sorted(ranks - {max(r for r in own if r in ranks)}))


def _preferred(planned: PlannedLayout) -> float:
    """Returns the seconds, and a little more for what the Trainer does not execute yet."""
    return planned.seconds * (1 + PREFERENCE * planned.layout.sharded)


def plan_layout(setting: Setting, layout: WeightLayout, batch: Sequence[int], seconds: float) -> PlannedLayout | None:
    """Returns the layout's step for a batch; None where passes or layer inputs don't fit.

    What a step's tokens add to memory is known after planning: it is planned again with the room that they need.
    """
    tokens = layout.expected(setting)
    for _ in range(ROUNDS):
        capacity = layout.capacity(setting, tokens)
        if min(capacity.values()) < 1:
            return None
        costs = layout.costs(setting, [capacity[r] for r in layout.ranks])
        try:
            step = plan_step(batch, costs, time_limit=seconds)
        except UserError:
            return None
        dealt = step_tokens(step, layout.ranks)
        if not layout.tokens.per_step or holds(setting, layout, step):
            return PlannedLayout(layout=layout, costs=costs, step=step)
        tokens = {r: max(tokens[r], 1.02 * dealt[r]) for r in layout.ranks}
    return None


def step_tokens(step: Step, ranks: Sequence[int]) -> dict[int, int]:
    """Returns by world rank the tokens of a step of working ranks numbered from 0."""
    dealt = dict.fromkeys(ranks, 0)
    for p in step.passes:
        for member, number in enumerate(p.ranks):
            dealt[ranks[number]] += p.tokens(member)
    return dealt


def holds(setting: Setting, layout: WeightLayout, step: Step) -> bool:
    """Returns whether every rank's memory holds a layer-major step: its largest pass and all of its layer inputs."""
    dealt, largest = step_tokens(step, layout.ranks), dict.fromkeys(layout.ranks, 0)
    for p in step.passes:
        for member, number in enumerate(p.ranks):
            rank = layout.ranks[number]
            largest[rank] = max(largest[rank], p.tokens(member))
    return all(
        layout.tokens.added(layout.memory[r], of_pass=largest[r], of_step=dealt[r]).total <= setting.device_bytes(r)
        for r in layout.ranks
    )


def all_subsets(setting: Setting) -> Iterator[tuple[int, ...]]:
    """Yields sets of working ranks: every number of hosts of every class, the first hosts of each; on small clusters
    also every number of devices of each host.
    """
    classes = setting.classes
    sizes = [(len(hosts), len(setting.host_ranks[hosts[0]])) for hosts in classes]
    parts = math.prod(math.comb(hosts + devices, devices) for hosts, devices in sizes) <= PARTS
    if not parts and math.prod(hosts + 1 for hosts, _ in sizes) > SUBSETS:
        counts: Iterable[tuple[Counts, ...]] = _few(classes, [devices for _, devices in sizes])
    else:
        counts = itertools.product(*(_counts(hosts, devices, parts) for hosts, devices in sizes))
    for numbers in counts:
        chosen = [
            r
            for hosts, own in zip(classes, numbers, strict=True)
            for h, n in zip(hosts, own, strict=True)
            for r in setting.host_ranks[h][:n]
        ]
        if chosen:
            yield tuple(sorted(chosen))


def _counts(hosts: int, devices: int, parts: bool) -> list[Counts]:
    """Returns the devices of each host of a class, descending: all or none, or in parts too."""
    if parts:
        return list(itertools.combinations_with_replacement(range(devices, -1, -1), hosts))
    return [(devices,) * n + (0,) * (hosts - n) for n in range(hosts, -1, -1)]


def _few(classes: Sequence[Sequence[int]], devices: Sequence[int]) -> Iterator[tuple[Counts, ...]]:
    """Yields all or none of every class, and of one class any number beside all of the others."""
    ways = [_counts(len(hosts), count, False) for hosts, count in zip(classes, devices, strict=True)]
    if len(classes) <= 12:
        yield from itertools.product(*((own[0], own[-1]) for own in ways))
    for i, own in enumerate(ways):
        for numbers in own[1:-1]:
            yield tuple(numbers if j == i else other[0] for j, other in enumerate(ways))


def decide(setting: Setting, *, seconds: float, plan_seconds: float) -> Participation | None:
    """Returns the best participation and layout; None where no layout holds the model on any set of ranks.

    Args:
        setting: what is planned.
        seconds: of processor time for the search; a first plan takes what it takes.
        plan_seconds: for a plan of a candidate.
    """
    return ParticipationSearch(setting, plan_seconds, seconds).run(all_subsets(setting))
