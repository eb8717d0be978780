"""Optimizer-state offload: which subgroups of a rank's state lie on which tier, and in which order a step updates them.

A plan is pure data with its predicted seconds and a bound: the linear program's, where all lanes work all the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heteromesh.errors import UserError
from heteromesh.planner.ownership.offload_rates import (
    TIERS,
    OffloadMemory,
    OffloadRank,
    OffloadRates,
    SharedMemory,
    SharedResource,
    Tier,
)
from heteromesh.planner.ownership.offload_split import split_tiers
from heteromesh.planner.ownership.offload_tasks import StepTasks, play, task_seconds

ALIGNMENT = 16
"""Elements that subgroups are cut at, from the start of a parameter: the widest vector of fp32 that torch uses."""
SUBGROUP = 32 << 20
STAGING, WEIGHTS, RING = 3, 4, 4
"""Buffers: three sets keep both directions of a link and the device at work at once."""
_LEADS = (1.0, 0.97, 0.94, 0.9, 0.85)
"""How much earlier than evenly staged subgroups come, so that the last flush doesn't trail."""
_MOST_TRIED = 400
"""Subgroups beyond which only the even order is tried."""


@dataclass(frozen=True, slots=True)
class Subgroup:
    """Elements [start, stop) of a rank's parameters one after the other, each beginning at a multiple of ALIGNMENT."""

    start: int
    stop: int
    tier: Tier

    @property
    def numel(self) -> int:
        """Returns how many they are."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """One rank's subgroups and the order of their updates."""

    subgroups: tuple[Subgroup, ...]
    order: tuple[int, ...]
    """Numbers of subgroups, as their updates are started."""
    apart: bool = False
    """Whether the device has memory of its own, to which weights must be copied."""
    staging: int = STAGING
    """Sets of buffers on the device for staged subgroups."""
    weights: int = WEIGHTS
    """Buffers on the host for gradients and updated weights on their way."""
    ring: int = RING
    """Buffers on the host for subgroups of the disk."""
    seconds: float = math.nan
    """Predicted for one update."""
    bound_seconds: float = math.nan
    """No schedule takes less at these rates."""

    def __post_init__(self) -> None:
        ends = [0, *(s.stop for s in self.subgroups)]
        if [s.start for s in self.subgroups] != ends[:-1] or sorted(self.order) != list(range(len(self.subgroups))):
            raise ValueError("subgroups must follow each other from 0 on, and the order must name each of them once")
        if any(s.start % ALIGNMENT or s.numel <= 0 for s in self.subgroups):
            raise ValueError(f"subgroups must begin at multiples of {ALIGNMENT} and hold something")
        if min(self.staging, self.weights, self.ring) < 1:
            raise ValueError("there must be a buffer of each kind")

    @property
    def numel(self) -> int:
        """Returns the elements of all subgroups."""
        return self.subgroups[-1].stop if self.subgroups else 0

    @property
    def largest(self) -> int:
        """Returns the elements of the largest subgroup."""
        return max((s.numel for s in self.subgroups), default=0)

    def numel_on(self, *tiers: Tier) -> int:
        """Returns how many elements lie there."""
        return sum(s.numel for s in self.subgroups if s.tier in tiers)

    def step_tasks(
        self, *, flipped: bool = False, active: Sequence[bool] | None = None, held: Mapping[int, int] | None = None
    ) -> StepTasks:
        """Returns the tasks of one step.

        flipped: the disk's subgroups the other way round, in every other step, so that those in memory come first.
        active: by subgroup, whether there is something to update. held: what the disk's ring holds, by buffer.
        """
        order = [i for i in self.order if active is None or active[i]]
        disk = [i for i in order if self.subgroups[i].tier == "disk"]
        turned = iter(reversed(disk) if flipped else disk)
        order = [next(turned) if self.subgroups[i].tier == "disk" else i for i in order]
        tasks = StepTasks(
            apart=self.apart,
            staging=self.staging,
            weights=self.weights,
            ring=self.ring,
            held=held or {},
            order=[i for i in order if self.subgroups[i].tier == "disk"],
        )
        for i in order:
            tasks.add(i, self.subgroups[i].tier)
        return tasks

    def predict(self, rates: OffloadRates) -> float:
        """Returns the seconds of an update at these rates, the disk's ring empty before it."""
        tasks = self.step_tasks().tasks
        seconds = [
            task_seconds(t, self.subgroups[t.subgroup].numel, self.subgroups[t.subgroup].tier, rates) for t in tasks
        ]
        # what all lanes share can't be played task by task: its total is what the step takes at least
        shared = [sum(s.numel * rates.seconds(s.tier)[r] for s in self.subgroups) for r in ("host_memory", "disk")]
        return max([*shared, *(end for _, end in play(tasks, seconds))], default=0.0)


def cut_evenly(numel: int, subgroup_numel: int, tier: Tier = "host") -> tuple[Subgroup, ...]:
    """Cuts elements into subgroups of that size; the last one takes what is left."""
    if subgroup_numel <= 0 or subgroup_numel % ALIGNMENT:
        raise UserError(f"a subgroup of {subgroup_numel} elements can't be cut: give a multiple of {ALIGNMENT}")
    return tuple(Subgroup(a, min(a + subgroup_numel, numel), tier) for a in range(0, numel, subgroup_numel))


def on_host(numel: int, subgroup_numel: int = SUBGROUP, *, apart: bool = False) -> OffloadPlan:
    """Returns the plan that leaves everything in host memory and updates it there."""
    subgroups = cut_evenly(numel, subgroup_numel)
    return OffloadPlan(subgroups=subgroups, order=tuple(range(len(subgroups))), apart=apart)


def plan_offload(
    numel: int,
    rates: OffloadRates,
    memory: OffloadMemory = OffloadMemory(),  # noqa: B008
    *,
    subgroup_numel: int = SUBGROUP,
    apart: bool = True,
) -> OffloadPlan:
    """Returns the plan of a rank that shares nothing. Raises UserError where the tiers don't hold the state."""
    return plan_offload_ranks(
        [OffloadRank(parameters=numel, rates=rates, memory=memory)], subgroup_numel=subgroup_numel, apart=apart
    )[0]


def plan_offload_ranks(
    ranks: Sequence[OffloadRank],
    shared: Sequence[SharedResource] = (),
    shared_memory: Sequence[SharedMemory] = (),
    *,
    subgroup_numel: int = SUBGROUP,
    apart: bool = True,
) -> list[OffloadPlan]:
    """Returns each rank's plan, for the least time until the last one has ended; the bound is that of all of them.

    apart: whether devices have memory of their own; nothing is staged or resident where not.
    """
    staging = [_staging_sets(rank, subgroup_numel) if apart else 0 for rank in ranks]
    capped = [_capped(rank, sets, apart) for rank, sets in zip(ranks, staging, strict=True)]
    split = split_tiers(capped, shared, shared_memory)
    if any(parts["disk"] > 0.5 for parts in split.parameters):
        # the ring for the disk's subgroups lies in host memory
        capped = [
            _less_host(rank, RING * subgroup_numel) if parts["disk"] > 0.5 else rank
            for rank, parts in zip(capped, split.parameters, strict=True)
        ]
        split = split_tiers(capped, shared, shared_memory)
    return [
        _round(rank, parts, max(1, sets), subgroup_numel, apart, split.bound_seconds)
        for rank, parts, sets in zip(capped, split.parameters, staging, strict=True)
    ]


def _staging_sets(rank: OffloadRank, subgroup_numel: int) -> int:
    size = min(subgroup_numel, rank.parameters) * rank.rates.state_bytes
    return int(min(STAGING, rank.memory.staging // size)) if size else STAGING


def _capped(rank: OffloadRank, sets: int, apart: bool) -> OffloadRank:
    memory = rank.memory if sets else replace(rank.memory, staging=0.0)
    return replace(rank, memory=memory if apart else replace(memory, device=0.0))


def _less_host(rank: OffloadRank, numel: int) -> OffloadRank:
    used = numel * rank.rates.state_bytes
    if used > rank.memory.host:
        raise UserError(
            f"host memory of {rank.memory.host / 1e9:.3f} GB doesn't hold the {RING} subgroups of "
            f"{used / RING / 1e9:.3f} GB that are on their way from and to the disk: make subgroups smaller"
        )
    return replace(rank, memory=replace(rank.memory, host=rank.memory.host - used))


def _round(
    rank: OffloadRank, parts: Mapping[Tier, float], sets: int, size: int, apart: bool, bound: float
) -> OffloadPlan:
    """Returns the best plan of whole subgroups near a split."""
    subgroups = cut_evenly(rank.parameters, size)
    best: OffloadPlan | None = None
    leads = _LEADS if len(subgroups) <= _MOST_TRIED else _LEADS[:1]
    for counts in _counts(rank, parts, size, len(subgroups)):
        for lead in leads if counts["staged"] else _LEADS[:1]:
            tiers = _interleave(counts, lead)
            plan = OffloadPlan(
                subgroups=tuple(replace(s, tier=tier) for s, tier in zip(subgroups, tiers, strict=True)),
                order=tuple(range(len(subgroups))),
                apart=apart,
                staging=sets,
                bound_seconds=bound,
            )
            plan = replace(plan, seconds=plan.predict(rank.rates))
            if best is None or plan.seconds < best.seconds:
                best = plan
    if best is None:
        raise UserError(
            f"the split fits, but not in whole subgroups of {size * rank.rates.state_bytes / 1e9:.3f} GB: "
            "make them smaller"
        )
    return best


def _counts(rank: OffloadRank, parts: Mapping[Tier, float], size: int, total: int) -> list[dict[Tier, int]]:
    """Returns numbers of subgroups by tier near a split, within memory."""
    # where there is only one subgroup it may be smaller than the others would be
    state = max(1.0, min(size, rank.parameters) * rank.rates.state_bytes)
    memory = rank.memory
    found: list[dict[Tier, int]] = []
    for resident in _near(parts["resident"] / size):
        for staged in _near(parts["staged"] / size):
            # whole subgroups leave a part of the faster tiers empty, which the disk takes
            for disk in (
                first + more
                for first in _near(parts["disk"] / size)[:1]
                for more in range(4 if parts["disk"] > 0.5 else 1)
            ):
                host = total - resident - staged - disk
                held = ((resident, memory.device), (staged + host, memory.host), (disk, memory.disk))
                fits = host >= 0 and all(count * state <= most for count, most in held)
                if fits and (staged == 0 or memory.staging > 0):
                    found.append({"resident": resident, "staged": staged, "host": host, "disk": disk})
    return found


def _near(value: float) -> list[int]:
    if value < 1e-6:
        return [0]
    low = math.floor(value + 1e-6)
    return sorted({low, math.ceil(value - 1e-6), low + 1})


def _interleave(counts: Mapping[Tier, int], lead: float) -> list[Tier]:
    """Returns the tiers in their order, each evenly spread (Bresenham): staged ones first, ones on the host last."""
    shift = {"staged": 0.0, "disk": 0.5, "host": 1.0, "resident": 1.0}
    places = [
        ((j + shift[tier]) / counts[tier] * (lead if tier == "staged" else 1.0), TIERS.index(tier), tier)
        for tier in TIERS
        for j in range(counts[tier])
    ]
    rank = {"staged": 0, "disk": 1, "resident": 2, "host": 3}
    return [tier for _, _, tier in sorted(places, key=lambda place: (place[0], rank[place[2]]))]
