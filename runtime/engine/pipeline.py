"""The engine of a job in pipeline stages: a step's micro-batches through this rank's stage, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from heteromesh.comm.gradients.exchange import GradientExchange
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.parallel.model.draws import token_places
from heteromesh.parallel.pipeline.engine import StageRunner
from heteromesh.parallel.pipeline.stage import MicroBatch, MicroBatchWork
from heteromesh.planner.plan import Pass
from heteromesh.runtime.engine.api import Measurements, NonFinite, PassMeasure
from heteromesh.runtime.work.source import Assignment


class Pipeline:
    """The `Engine` of pipeline stages. A pass of the plan is a micro-batch of the pipeline that begins on its rank."""

    def __init__(self, runner: StageRunner) -> None:
        self._runner = runner

    def run(self, assignment: Assignment, world: World, exchange: GradientExchange) -> Measurements:
        assert assignment.step is not None
        mine = [
            (position, plan)
            for position, plan in enumerate(assignment.step.passes)
            if self._is_mine(position, plan) and plan.tokens(0)
        ]
        batches = [self._micro_batch(assignment, position, plan) for position, plan in mine]
        places = [assignment.places[i] for _, plan in mine for i in plan.sequences]
        # a sequence was worked on by all ranks of its pipeline together
        with exchange.share(tuple(world.members[rank] for rank in self._runner.pipeline), places) as share:
            work = self._runner.run(batches, assignment.number, assignment.divisor, exchange.last_backward)
            if self._runner.is_last:
                share.loss += sum(float(losses.double().sum()) for losses in work.losses.values())
                share.valid += sum(assignment.inputs[position].valid for position, _ in mine)
        return Measurements(
            # what the plan says of a pass is about the rank that it names
            passes=tuple(
                PassMeasure(position, world.rank, seconds, 0.0, 0)
                for (position, plan), seconds in zip(mine, work.seconds, strict=True)
                if world.rank in plan.ranks
            ),
            busy_seconds=sum(work.seconds),
            non_finite=_non_finite(assignment, world, [plan for _, plan in mine], work),
        )

    def close(self) -> None:
        self._runner.close()

    def _is_mine(self, position: int, plan: Pass) -> bool:
        first = self._runner.placement.stages[0].ranks
        if len(plan.ranks) != 1 or plan.ranks[0] not in first:
            raise UserError(
                f"pass {position} of the step names {plan.ranks}: under a pipeline a pass is a micro-batch that begins "
                f"on one of the first stage's ranks {first}; make the step with pack_step"
            )
        return plan.ranks[0] == self._runner.entry

    def _micro_batch(self, assignment: Assignment, position: int, plan: Pass) -> MicroBatch:
        device, given = self._runner.world.device, assignment.inputs[position]
        places = [assignment.places[i] for i in plan.sequences]
        context = prepare_pass(plan, plan.shards[0], self._runner.world, (1.0,) * self._runner.world.size)
        tokens, positions, labels = (
            t.to(device, non_blocking=True) for t in (given.tokens, given.positions, given.labels)
        )
        return MicroBatch(
            context=context,
            places=token_places(context.layout.segments[0], places, device),
            tokens=tokens,
            positions=positions,
            labels=labels,
        )


def _non_finite(
    assignment: Assignment, world: World, plans: Sequence[Pass], work: MicroBatchWork
) -> tuple[NonFinite, ...]:
    """Returns the sequences whose losses are not finite, on the last stage."""
    found = []
    for index, losses in work.losses.items():
        plan = plans[index]
        if math.isfinite(float(losses.sum())):
            continue
        for sequence, part in zip(plan.sequences, losses.split(list(plan.shards[0])), strict=True):
            if not math.isfinite(value := float(part.sum())):
                found.append(NonFinite(world.rank, assignment.places[sequence], value))
    return tuple(found)
