"""Batches planned for whoever is in the job: ahead of the loop where ranks stay, else when the loop asks."""

from __future__ import annotations

import time

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.plan import Step
from heteromesh.runtime.work.feed import PlanFeed
from heteromesh.runtime.work.plan_service import PlanService, Question
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Batch, Sampler
from heteromesh.runtime.work.source import Assignment, CostModel, PlanningFailed

Answer = tuple[Step, tuple[float, ...], Correction] | UserError


class Planned:
    """The `WorkSource` of plans made by the planner or given in a plan file.

    With a feed (a fixed world) plans and tensors are there before they are asked for. Without one rank 0 plans the
    batch ahead for the members that it knows, and tells the plan when the loop asks; when members were lost or joined
    meanwhile, or sequences are missing, it plans anew.
    """

    def __init__(
        self, sampler: Sampler, reader: Reader, service: PlanService | None, costs: CostModel, feed: PlanFeed | None
    ) -> None:
        """`service`: of rank 0; None on ranks that never are."""
        self._sampler, self._reader, self._service, self._costs, self._feed = sampler, reader, service, costs, feed
        self._batch: Batch | None = None

    def plan(self, number: int, world: World, done: frozenset[int]) -> Assignment:
        if self._feed is not None:
            return self._feed.next(number)
        if self._batch is None:
            self._batch = self._sampler.next_batch()
        batch = self._batch
        places = tuple(i for i in range(len(batch.lengths)) if i not in done)
        if not places:
            return Assignment(number=number, batch=batch, places=(), step=None, divisor=max(1, batch.tokens))
        started = time.perf_counter()
        answer: Answer = world.broadcast(self._answer(number, world, places) if world.rank == 0 else None)
        told = time.perf_counter()
        if isinstance(answer, UserError):
            raise PlanningFailed(answer)
        step, speeds, correction = answer
        inputs = self._reader.step_inputs(step, [batch.sequences[i] for i in places], world.rank)
        return Assignment(
            number=number,
            batch=batch,
            places=places,
            step=step,
            inputs=inputs,
            divisor=max(1, batch.tokens),
            speeds=speeds,
            correction=correction,
            plan_wait_seconds=told - started,
            data_wait_seconds=time.perf_counter() - told,
        )

    def committed(self, world: World, number: int, last: bool) -> None:
        self._batch = None
        if self._feed is not None or last or world.rank != 0:
            return
        self._batch = self._sampler.next_batch()
        costs = self._costs.of(world.members)
        question = self._question(number + 1, world, tuple(range(len(self._batch.lengths))))
        assert self._service is not None
        self._service.prepare(question, costs, self._costs.correction(world.members))

    def restart(self) -> None:
        self._batch = None

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()

    def _answer(self, number: int, world: World, places: tuple[int, ...]) -> Answer:
        costs, correction = self._costs.of(world.members), self._costs.correction(world.members)
        assert self._service is not None
        try:
            step = self._service.plan(self._question(number, world, places), costs, correction)
        except UserError as error:
            return error
        return step, correction.applied(costs).speeds, correction

    def _question(self, number: int, world: World, places: tuple[int, ...]) -> Question:
        assert self._batch is not None
        return Question(
            number=number,
            lengths=tuple(self._batch.lengths[i] for i in places),
            members=world.members,
            whole=len(places) == len(self._batch.lengths) and self._costs.complete(world.members),
        )
