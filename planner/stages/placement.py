"""Which hosts form which pipeline stage, how many layers each has, and which ranks sum gradients (docs/placement.md).

Like Holmes (arXiv 2312.03549) it can cut the model between fabrics, so that only activations cross the slow network,
with gradient sums inside a fabric. Holmes never considers the other way, replicas on both sides whose gradients cross
hierarchically; which one is better depends on the batch, so both are solved and the better one is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from heteromesh.errors import UserError
from heteromesh.planner.stages.compositions import Composition, compositions
from heteromesh.planner.stages.hostclasses import HostClass, host_classes
from heteromesh.planner.stages.hosts import ClusterResources, HostResources
from heteromesh.planner.stages.predict import Prediction, deal, predict, set_up
from heteromesh.planner.stages.program import Chosen, Model
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.planner.stages.workload import Workload

Family = Literal["pipeline across fabrics", "hierarchical data parallel across fabrics", "pipeline", "data parallel"]
COMPOSITIONS = 400
"""Of a stage, at most; with more, hosts of similar speed are counted as one kind."""
TOLERANCES = (0.0, 0.02, 0.05, 0.1, 0.3, 1.0, math.inf)
"""Of speeds within a kind, the first with few enough compositions."""
Found = tuple[Placement, Prediction, Workload]
GRACE = 5.0
"""Seconds beyond the time limit in which to find a first placement."""
CLOSE = 1e-6
"""Relative: what counts as equal."""
FAR = 1e6
"""Times the compute alone: a step that takes longer is no step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The best placement of a family, and what is proved about the family."""

    family: Family
    placement: Placement | None
    """None where nothing was found; then `obstacle` says why."""
    prediction: Prediction | None
    work: Workload | None
    bound_seconds: float
    """No placement of the family takes less; infinite where there is none."""
    obstacle: str = ""

    @property
    def seconds(self) -> float:
        return self.prediction.seconds if self.prediction else math.inf

    @property
    def gap(self) -> float:
        """seconds / bound_seconds - 1."""
        return self.seconds / self.bound_seconds - 1 if self.bound_seconds and self.prediction else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The chosen placement, and the best of every other family."""

    placement: Placement
    prediction: Prediction
    work: Workload
    family: Family
    bound_seconds: float
    """No placement at all takes less (of whole hosts, with these micro-batches)."""
    candidates: tuple[Candidate, ...]

    @property
    def gap(self) -> float:
        """seconds / bound_seconds - 1."""
        return self.prediction.seconds / self.bound_seconds - 1


def place(
    resources: ClusterResources,
    works: Sequence[Workload],
    *,
    time_limit: float = 5.0,
    tensor_parallel: Sequence[int] | None = None,
) -> Decision:
    """Returns the fastest placement over all families, numbers of stages and of pipelines, and ways to cut the batch.

    Args:
        works: the batch in micro-batches of several sizes.
        time_limit: seconds of this thread's processor time in which to stop improving; what is then unproved shows in
            the gap.
        tensor_parallel: degrees to consider; default: every divisor of any host's devices.

    Raises UserError where no placement fits the memory and for hosts that no stages can be made of.
    """
    deadline = time.thread_time() + time_limit
    degrees = sorted(set(tensor_parallel or _divisors(resources)))
    candidates = []
    for left, family in zip((2, 1), families(resources), strict=True):
        now = time.thread_time()
        search = _Search(family, resources, works, degrees, now + max(deadline - now, 0.1) / left)
        candidates.append(search.run())
    best = min(candidates, key=lambda c: c.seconds)
    if best.placement is None or best.prediction is None or best.work is None:
        raise UserError("; ".join(f"{c.family}: {c.obstacle}" for c in candidates))
    return Decision(
        placement=best.placement,
        prediction=best.prediction,
        work=best.work,
        family=best.family,
        bound_seconds=min(c.bound_seconds for c in candidates),
        candidates=tuple(candidates),
    )


def families(resources: ClusterResources) -> tuple[Family, Family]:
    """Returns the two families to compare on these hosts."""
    if len(resources.domains) > 1:
        return "pipeline across fabrics", "hierarchical data parallel across fabrics"
    return "pipeline", "data parallel"


def _divisors(resources: ClusterResources) -> list[int]:
    most = {len(host.speeds) for host in resources.hosts}
    return [t for t in range(1, max(most) + 1) if any(m % t == 0 for m in most)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One program to solve."""

    work: Workload
    pipelines: int
    stages: int
    classes: list[HostClass]
    options: tuple[Composition, ...]
    bound: float
    """A bound by a formula."""


@dataclass(slots=True)
class _Search:
    """The best placement of one family."""

    family: Family
    resources: ClusterResources
    works: Sequence[Workload]
    degrees: Sequence[int]
    deadline: float

    def run(self) -> Candidate:
        cases = self._cases()
        # short pipelines are solved at once, and what they take rules out most of the others
        cases.sort(key=lambda c: (c.stages, c.bound))
        best: Found | None = None
        bounds = []
        for case in cases:
            left = self.deadline - time.thread_time()
            below = best[1].seconds if best else math.inf
            if case.bound >= below * (1 - CLOSE) or left <= (0 if best else -GRACE):
                bounds.append(case.bound)
                continue
            bound, chosen = self._solve(case, max(left / 2, 0.2), below)
            bounds.append(max(min(bound, below), case.bound))
            for placement in [self._realise(chosen, case)] if chosen else []:
                best = self._better(best, placement, case.work, bounds[-1])
        obstacle = "no placement fits the devices' memory: take more hosts, smaller micro-batches or more memory"
        if not cases:
            obstacle = "no stages of whole hosts with equal numbers of replicas can be made of these hosts"
        elif bounds and min(bounds) < math.inf:
            obstacle = "no placement was found in the time limit: raise it"
        return self._candidate(best, min(bounds, default=math.inf), obstacle)

    def _better(self, best: Found | None, placement: Placement, work: Workload, bound: float) -> Found | None:
        """Moves layers one at a time while that helps (the program's paths are not all there are)."""
        prediction = self._predict(placement, work)
        while prediction and prediction.seconds > bound * (1 + CLOSE) and time.thread_time() < self.deadline:
            moves = ((m, self._predict(m, work)) for m in _moves(placement))
            known = [(p.seconds, m, p) for m, p in moves if p]
            seconds, move, after = min(known, key=lambda k: k[0], default=(math.inf, placement, prediction))
            if seconds >= prediction.seconds * (1 - CLOSE):
                break
            placement, prediction = move, after
        if prediction and (best is None or prediction.seconds < best[1].seconds):
            return placement, prediction, work
        return best

    def _candidate(self, best: Found | None, bound: float, obstacle: str) -> Candidate:
        placement, prediction, work = best or (None, None, None)
        return Candidate(
            family=self.family,
            placement=placement,
            prediction=prediction,
            work=work,
            bound_seconds=min(bound, prediction.seconds if prediction else math.inf),
            obstacle="" if best else obstacle,
        )

    def _cases(self) -> list[_Case]:
        ranks = sum(len(host.speeds) for host in self.resources.hosts)
        cases: list[_Case] = []
        grouped = [host_classes(self.resources, tolerance) for tolerance in TOLERANCES]
        for work in self.works:
            for pipelines in range(1, min(ranks, work.micro_batches) + 1):
                classes, options = self._options(pipelines, work, grouped)
                if options:
                    cases += self._of(work, pipelines, classes, options)
        return cases

    def _options(
        self, pipelines: int, work: Workload, grouped: Sequence[list[HostClass]]
    ) -> tuple[list[HostClass], tuple[Composition, ...]]:
        for classes in grouped:
            listed = [(host_class.best, len(host_class.hosts)) for host_class in classes]
            alone = self.family == "pipeline across fabrics"
            every = compositions(listed, pipelines, work, self.degrees, self.resources.uplink, one_fabric=alone)
            options = tuple(islice(every, COMPOSITIONS + 1))
            if len(options) <= COMPOSITIONS:
                break
        return classes, options

    def _of(
        self, work: Workload, pipelines: int, classes: list[HostClass], options: tuple[Composition, ...]
    ) -> Iterator[_Case]:
        speeds = [v for host in self.resources.hosts for v in host.speeds]
        widths = [pipelines * o.tensor_parallel for o in options]
        first, last = -(-len(speeds) // max(widths)), len(speeds) // min(widths)
        if self.family == "pipeline":
            first = max(first, 2)
        if self.family == "data parallel":
            last = min(last, 1)
        layer = min(o.seconds_per_layer for o in options)
        share = math.ceil(work.micro_batches / pipelines)
        busy = work.micro_batches * (work.layers * work.layer_seconds + work.head_seconds) / sum(speeds)
        for stages in range(first, min(last, work.layers, len(self.resources.hosts)) + 1):
            # the mean over s of the path through all stages and then through stage s as often as it can
            rounds = 1 + max(0.0, share - 2 / 3 - stages / 3) / stages
            yield _Case(
                work=work,
                pipelines=pipelines,
                stages=stages,
                classes=classes,
                options=options,
                bound=max(busy, work.layers * layer * rounds),
            )

    def _solve(self, case: _Case, seconds: float, below: float) -> tuple[float, Chosen | None]:
        model = Model(
            stages=case.stages,
            options=case.options,
            supply=[len(host_class.hosts) for host_class in case.classes],
            work=case.work,
            uplink=self.resources.uplink,
            spanning=self.family == "hierarchical data parallel across fabrics",
        )
        chosen = model.solve(seconds, min(below, FAR * model.scale))
        return model.bound, chosen

    def _realise(self, chosen: Chosen, case: _Case) -> Placement:
        """Names hosts, pairs replicas by fabric and speed, and deals out micro-batches by speed."""
        pools = [list(host_class.hosts) for host_class in case.classes]
        stages = []
        for composition, layers in chosen.stages:
            hosts = [pools[g].pop(0) for g, n in enumerate(composition.counts) for _ in range(n)]
            t = composition.tensor_parallel
            stages.append(Stage(ranks=self._ranks(hosts, t), layers=layers, tensor_parallel=t))
        even = deal(case.work.micro_batches, [[1.0]] * case.pipelines)
        placement = Placement(stages=tuple(stages), micro_batches=even)
        counts = deal(case.work.micro_batches, set_up(placement, self.resources, case.work).stage_seconds)
        return replace(placement, micro_batches=counts)

    def _ranks(self, hosts: Sequence[HostResources], t: int) -> tuple[int, ...]:
        fabrics = self.resources.domains
        replicas = [
            (fabrics.index(host.fabric), -host.speeds[i + t - 1], host.ranks[i : i + t])
            for host in hosts
            for i in range(0, len(host.ranks), t)
        ]
        return tuple(rank for _, _, ranks in sorted(replicas) for rank in ranks)

    def _predict(self, placement: Placement, work: Workload) -> Prediction | None:
        try:
            return predict(placement, self.resources, work)
        except UserError:
            return None  # pipelines of unequal length may need more memory than the program saw


def _moves(placement: Placement) -> Iterator[Placement]:
    """Yields placements with one layer moved from any stage to any other."""
    stages = placement.stages
    for source, giver in enumerate(stages):
        for target, taker in enumerate(stages):
            if source != target and giver.layers > 1:
                changed = list(stages)
                changed[source] = replace(giver, layers=giver.layers - 1)
                changed[target] = replace(taker, layers=taker.layers + 1)
                yield replace(placement, stages=tuple(changed))
