"""The integer program of placement, for one number of pipelines, stages and micro-batches.

    x[s, q] = 1: stage s is made of composition q;  z[s, q]: its layers.  Minimise T subject to
    sum_q x[s, q] = 1;  sum_s,q counts[q, g] x[s, q] = hosts of kind g;  sum z = L;
    x[s, q] <= z[s, q] <= (layers that fit the memory at stage s) x[s, q];
    b_s >= seconds of a cut between stages s and s + 1 over RDMA or Ethernet;
    T >= every path of `one_f_one_b.lower_bounds` in tau_s = sum_q (seconds per layer) z + (seconds of the head) x;
    T >= path to the end of stage s + its gradient sum and optimizer.

The paths hold for the pipeline with the most micro-batches, whose replicas are at best a stage's fastest. Where
replicas are unequal, T is also at least what a stage takes when all its replicas share its micro-batches by speed. No
term is larger than in the exact prediction, so the solver's bound holds for every placement of this family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from heteromesh.planner.solver import Program
from heteromesh.planner.stages.compositions import Composition
from heteromesh.planner.stages.hosts import LATENCY_SECONDS
from heteromesh.planner.stages.one_f_one_b import Path, lower_bounds
from heteromesh.planner.stages.workload import FORWARD_SHARE, Workload

SOLVER_GAP = 1e-3
"""Relative: the solver may stop there."""
JoinOptions = list[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A solution: per stage its composition and layers."""

    stages: tuple[tuple[Composition, int], ...]


@dataclass(kw_only=True, slots=True)
class Model:
    """One program, built piece by piece. Seconds are in units of `scale`, so that the numbers are near 1."""

    stages: int
    options: Sequence[Composition]
    supply: Sequence[int]
    """Hosts of each kind."""
    work: Workload
    uplink: float
    spanning: bool
    """Ask for at least one stage that spans fabrics."""
    program: Program = field(default_factory=lambda: Program("placement"))
    bound: float = 0.0
    """No placement of this family takes fewer seconds."""
    x: dict[tuple[int, int], int] = field(default_factory=dict)
    z: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Micro-batches of a pipeline, on average."""
        return self.work.micro_batches / len(self.options[0].replica_speeds)

    @property
    def scale(self) -> float:
        return self.work.layers * self.work.layer_seconds * self.share / self.stages

    def solve(self, seconds: float, below: float) -> Chosen | None:
        """Returns the best placement under `below` seconds; None where none was found. Sets `bound`."""
        if not self._choices():
            self.bound = math.inf
            return None
        total = self.program.real(0.0, below / self.scale)
        cuts = [self._cut(s) for s in range(self.stages - 1)]
        self._paths(total, cuts)
        values = self.program.minimise([(1.0, total)], seconds, gap=SOLVER_GAP)
        self.bound = self.program.bound * self.scale
        return None if values is None else self._read(values)

    def _choices(self) -> bool:
        program = self.program
        for s in range(self.stages):
            flight = min(math.ceil(self.share), self.stages - s)
            for q, option in enumerate(self.options):
                most = option.most_layers(flight, first=s == 0, last=s == self.stages - 1)
                if most >= 1:
                    most = min(most, self.work.layers - self.stages + 1)
                    self.x[s, q], self.z[s, q] = program.binary(), program.integer(0, most)
                    program.at_most([(1.0, self.z[s, q]), (-float(most), self.x[s, q])], 0)
                    program.at_most([(1.0, self.x[s, q]), (-1.0, self.z[s, q])], 0)
        if any(not any(at == s for at, _ in self.x) for s in range(self.stages)):
            return False
        for s in range(self.stages):
            program.equal([(1.0, v) for (at, _), v in self.x.items() if at == s], 1)
        for g, there in enumerate(self.supply):
            program.equal([(float(n), v) for (_, q), v in self.x.items() if (n := self.options[q].counts[g])], there)
        program.equal([(1.0, v) for v in self.z.values()], self.work.layers)
        if self.spanning:
            wide = [(-1.0, v) for (_, q), v in self.x.items() if self.options[q].domain is None]
            if not wide:
                return False
            program.at_most(wide, -1)
        return True

    def _cut(self, s: int) -> int:
        """Returns seconds of handing a micro-batch from stage s to s + 1, one way."""
        program, scale = self.program, self.scale
        cut = program.real(0.0, 1e6)
        for at in (s, s + 1):
            own = [(o.transfer_seconds(o.domain == "") / scale, v) for o, v in self._at(at)]
            program.at_most([*own, (-1.0, cut)], 0)
        for domain in {o.domain for o in self.options} - {None}:
            for here, there in ((s, s + 1), (s + 1, s)):
                slow = [(self._crossing(o) / scale, v) for o, v in self._at(here) if o.domain == domain]
                far = max((c for c, _ in slow), default=0.0)
                # between the same fabric, or with a stage that spans fabrics, some may go by RDMA
                near = [(-far, v) for o, v in self._at(there) if o.domain in (domain, None)]
                program.at_most([*slow, *near, (-1.0, cut)], 0)
        return cut

    def _crossing(self, option: Composition) -> float:
        """Returns the variable of a cut to another fabric."""
        replicas = len(option.replica_speeds)
        return max(option.transfer_seconds(True), replicas * self.work.boundary_bytes / self.uplink)

    def _at(self, s: int) -> list[tuple[Composition, int]]:
        return [(self.options[q], v) for (at, q), v in self.x.items() if at == s]

    def _paths(self, total: int, cuts: Sequence[int]) -> None:
        whole, places = math.ceil(self.share), range(self.stages)
        taus = [self._tau(s, [o.seconds_per_layer for o in self.options]) for s in places]
        updates = [self._per_parameter(s, [o.update_seconds for o in self.options]) for s in places]
        sums = [self._per_parameter(s, [o.sum_seconds for o in self.options]) for s in places]
        for path in lower_bounds(self.stages, whole):
            self._row(total, path, taus, cuts, [])
        for upto in places:
            for path in lower_bounds(self.stages, whole, upto):
                self._row(total, path, taus, cuts, [(1.0, updates[upto])])
                # the sum starts when the last backward's first layer is done
                early = list(path.stages)
                early[upto] -= 1 - FORWARD_SHARE
                after = [(1.0, sums[upto]), (1.0, updates[upto])]
                self._row(total, replace(path, stages=tuple(early)), taus, cuts, after)
        if any(not o.even for o in self.options):
            for s in places:
                self._shared(total, s, taus, cuts, [(1.0, sums[s]), (1.0, updates[s])])

    def _row(self, total: int, path: Path, taus: Sequence[int], cuts: Sequence[int], after: JoinOptions) -> None:
        terms: JoinOptions = [(-1.0, total), *after]
        terms += zip(path.stages, taus, strict=True)
        terms += zip(path.transfers, cuts, strict=True)
        self.program.at_most(terms, -path.hops * LATENCY_SECONDS / self.scale)

    def _shared(self, total: int, s: int, taus: Sequence[int], cuts: Sequence[int], after: JoinOptions) -> None:
        """The way to stage s and back, and all micro-batches through it at the replicas' common pace."""
        pace = self._tau(s, [o.shared_seconds_per_layer for o in self.options])
        there: JoinOptions = [(-1.0, total), (self.share, pace)]
        back: JoinOptions = [(1 - FORWARD_SHARE, tau) for tau in taus[:s]] + [(1.0, cut) for cut in cuts[:s]]
        there += [(FORWARD_SHARE, tau) for tau in taus[:s]] + [(1.0, cut) for cut in cuts[:s]]
        self.program.at_most([*there, *back], 0)
        self.program.at_most([*there, after[-1]], 0)
        # the gradient sum hides behind no more than the last backward of the slowest replica
        slowest = [o.layer_seconds(min(o.replica_speeds)) for o in self.options]
        last = self._tau(s, slowest, head=max(o.head_ratio for o in self.options))
        self.program.at_most([*there, (-(1 - FORWARD_SHARE), last), *after], 0)

    def _tau(self, s: int, per_layer: Sequence[float], head: float = 1.0) -> int:
        """Returns seconds of a micro-batch in stage s; the head's are `head` times the fastest replica's."""
        ends = [o.head_seconds * head * (s == self.stages - 1) for o in self.options]
        return self._sum(s, per_layer, ends)

    def _per_parameter(self, s: int, seconds: Sequence[float]) -> int:
        ends = self.work.stage_parameters(0, first=s == 0, last=s == self.stages - 1)
        layer = self.work.layer_parameters
        return self._sum(s, [layer * each for each in seconds], [ends * each for each in seconds])

    def _sum(self, s: int, per_layer: Sequence[float], once: Sequence[float]) -> int:
        """Adds a variable for what stage s takes: per layer, and once."""
        result = self.program.real(0.0, 1e6)
        terms: JoinOptions = [(-1.0, result)]
        for (at, q), v in self.z.items():
            if at == s:
                terms += [(per_layer[q] / self.scale, v), (once[q] / self.scale, self.x[s, q])]
        self.program.equal(terms, 0)
        return result

    def _read(self, values: Sequence[float]) -> Chosen | None:
        chosen = []
        for s in range(self.stages):
            mine = [(values[v], q) for (at, q), v in self.x.items() if at == s]
            q = max(mine)[1]
            chosen.append((self.options[q], round(values[self.z[s, q]])))
        used = [sum(o.counts[g] for o, _ in chosen) for g in range(len(self.supply))]
        if used != list(self.supply) or sum(n for _, n in chosen) != self.work.layers or min(n for _, n in chosen) < 1:
            return None  # the solver's time ended before it had a solution
        return Chosen(tuple(chosen))
