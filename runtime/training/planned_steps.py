"""Planned steps for a training loop of one's own (docs/own-loop.md, examples/own_loop.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext

from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.planner.cost.passes import Costs
from heteromesh.runtime.engine.calibrate import Calibration
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.hooks.cost_learning import CostLearning, FixedCosts
from heteromesh.runtime.work.feed import PlanFeed
from heteromesh.runtime.work.plan_service import PlanService
from heteromesh.runtime.work.reader import Reader, Sequences
from heteromesh.runtime.work.sampler import Sampler
from heteromesh.runtime.work.source import Assignment, PlanningFailed


@contextmanager
def planned_steps(
    engine: PassMajor,
    exchange: GradientReducer,
    world: World,
    data: Sequences,
    *,
    batch_tokens: int,
    steps: int,
    seed: int = 0,
    costs: Costs | None = None,
    plan_seconds: float = 0.2,
) -> Iterator[Iterator[Assignment]]:
    """Opens the work of steps 1 to `steps`, in order: what the engine runs on this rank, planned ahead.

    Batches are those of a `Trainer` with these settings; all arguments are equal on every rank. costs: of passes; None:
    the engine measures its model. plan_seconds: of computing, for a plan. Raises UserError where a step can't be
    planned, on every rank.
    """
    reader = Reader(data)
    sampler = Sampler(reader.lengths, batch_tokens=batch_tokens, seed=seed)
    if costs is None:
        executor = StepExecutor.of(engine, exchange, world, scatter=False)
        costs = Calibration(executor, reader.sample_input, max(reader.lengths)).measure()
    known = CostLearning(FixedCosts(costs), learns=False, waits_known=True, seconds_per_step=costs.seconds_per_step)
    service = PlanService(plan_seconds) if world.rank == 0 else None
    with closing(service) if service is not None else nullcontext():
        feed = PlanFeed(world, sampler, reader, service, known, first=0, last=steps, ahead=1)
        yield _in_order(feed, steps)
        feed.close()  # not after an error, which may be this rank's alone


def _in_order(feed: PlanFeed, steps: int) -> Iterator[Assignment]:
    try:
        for number in range(1, steps + 1):
            yield feed.next(number)
    except PlanningFailed as error:
        raise error.reason from None
