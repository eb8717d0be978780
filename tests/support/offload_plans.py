"""Plans of optimizer-state offload that no planner would make, and lanes that run tasks in any allowed order."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from heteromesh.parallel.state.offload.lanes import Lanes, Work
from heteromesh.planner.ownership.offload import OffloadPlan, cut_evenly
from heteromesh.planner.ownership.offload_rates import TIERS, Tier
from heteromesh.planner.ownership.offload_tasks import LaneTask


def random_plan(seed: int, tiers: Sequence[Tier] = TIERS, apart: bool = True) -> Callable[[int], OffloadPlan]:
    """Any tier for each subgroup, any order, any number of buffers."""

    def plan(numel: int) -> OffloadPlan:
        rng = random.Random(seed)
        cut = cut_evenly(numel, 16 * rng.choice((1, 1, 2, 3, 5)))
        order = list(range(len(cut)))
        rng.shuffle(order)
        buffers = {name: rng.randint(1, 3) for name in ("staging", "weights", "ring")}
        subgroups = tuple(replace(s, tier=rng.choice(tiers)) for s in cut)
        return OffloadPlan(subgroups=subgroups, order=tuple(order), apart=apart, **buffers)

    return plan


class ShuffledLanes(Lanes):
    """Runs tasks one at a time, each lane's in order, and takes any that is free to go: whatever timing could do."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    @torch.no_grad()
    def run(self, plan: OffloadPlan, tasks: Sequence[LaneTask], work: Work) -> None:
        queues = defaultdict(list)
        for number, task in enumerate(tasks):
            queues[task.lane].append(number)
        done: set[int] = set()
        while len(done) < len(tasks):
            heads = [queue[0] for queue in queues.values() if queue and done.issuperset(tasks[queue[0]].after)]
            number = self._rng.choice(heads)
            work(tasks[number])
            queues[tasks[number].lane].pop(0)
            done.add(number)
