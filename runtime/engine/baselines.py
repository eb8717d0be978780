"""Times the same batches under the plan and under the static even layouts, in turns, on the same weights."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from heteromesh.errors import UserError
from heteromesh.parallel.model.undisturbed import undisturbed
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Step
from heteromesh.planner.report.assemble import static_layouts
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenSplit:
    """One static layout against the plan, over several batches."""

    layout: str
    ratios: tuple[float, ...]
    """Seconds of the static layout / seconds of the plan, one a batch."""
    ratio: float
    """All seconds of the static layout / all seconds of the plan."""
    largest_loss_difference: float
    """Relative."""
    same: int
    """Batches for which the plan is this very layout: run once, ratio 1."""

    def line(self) -> str:
        """Describes it for people."""
        return (
            f"against {self.layout}: the plan is {self.ratio:.2f}x as fast on the same {len(self.ratios)} batches "
            f"(single batches {min(self.ratios):.2f}x to {max(self.ratios):.2f}x); "
            f"losses differ by at most {self.largest_loss_difference:.1e} (relative)"
            + (f"; for {self.same} of them the plan is this layout" if self.same else "")
        )


def compare(
    executor: StepExecutor,
    reader: Reader,
    batches: Sequence[tuple[Batch, Step]],
    costs: Costs,
    stop: Callable[[], object] = lambda: None,
) -> tuple[EvenSplit, ...]:
    """Runs forward, backward and gradient sum of every batch under each layout; no update. Equal on every rank.

    Where `stop`, asked on every rank before each batch, is true, there is no comparison.
    """
    if executor.world.size == 1 or not batches:
        return ()
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    same: Counter[str] = Counter()
    for batch, planned in batches:
        if stop():
            return ()
        static = static_steps(batch.lengths, costs)
        others = {name: step for name, step in static.items() if step.passes != planned.passes}
        with undisturbed(executor.model):
            results = time_layouts(executor, reader, batch, {"plan": planned} | others)
        same.update(static.keys() - others.keys())
        for name in ("plan", *static):
            took, loss = results.get(name, results["plan"])
            seconds.setdefault(name, []).append(took)
            losses.setdefault(name, []).append(loss)
    return tuple(
        EvenSplit(
            layout=name,
            ratios=tuple(s / p for s, p in zip(seconds[name], seconds["plan"], strict=True)),
            ratio=sum(seconds[name]) / sum(seconds["plan"]),
            largest_loss_difference=max(abs(a / b - 1) for a, b in zip(losses[name], losses["plan"], strict=True)),
            same=same[name],
        )
        for name, _ in static_layouts(costs.ranks)
        if len(seconds.get(name, ())) == len(batches)
    )


def static_steps(lengths: Sequence[int], costs: Costs) -> dict[str, Step]:
    """Returns the static layouts that can run these sequences at all."""
    steps = {}
    for name, layout in static_layouts(costs.ranks):
        try:
            steps[name] = layout(lengths, costs)
        except UserError:
            continue  # a sequence that one rank can't hold, or more ranks than any method splits over
    return steps


def time_layouts(
    executor: StepExecutor, reader: Reader, batch: Batch, steps: Mapping[str, Step]
) -> dict[str, tuple[float, float]]:
    """Returns (seconds of the slowest rank, loss) by layout; layouts take turns so that drift hits all alike."""
    world = executor.world
    results = {}
    inputs = {name: reader.step_inputs(step, batch.sequences, world.rank) for name, step in steps.items()}
    # in random order, the same on every rank: what ran before leaves its mark on caches and the allocator
    for name in random.Random(batch.index).sample(list(steps), len(steps)):
        world.barrier()
        start = time.perf_counter()
        loss = executor.run(steps[name], inputs[name], number=0).loss
        results[name] = max(world.gather(time.perf_counter() - start)), loss
    return results
