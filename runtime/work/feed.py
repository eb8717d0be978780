"""Plans and tensors ahead of the training loop: a thread per rank, rank 0's asks the planner and tells the others."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

import torch

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.plan import Step
from heteromesh.runtime.work.plan_service import PlanService, Question
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Batch, Sampler
from heteromesh.runtime.work.source import Assignment, CostModel, PlanningFailed

LATE_FACTOR = 3
"""A plan that takes more than a third of a step's predicted seconds may come too late, as predictions err."""
PREPARATIONS = 4
"""Late steps whose longest preparation counts."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch and how it will be trained, as rank 0 tells it."""

    batch: Batch
    step: Step
    correction: Correction
    speeds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An assignment, and when (time.perf_counter()) its plan and its tensors were here."""

    assignment: Assignment
    planned_at: float
    ready_at: float


class PlanFeed:
    """Prepares the steps after `first`, up to `last`, of a world whose ranks stay.

    A step is planned while the one before it runs, so that the plan knows what passes lately took; earlier, at most
    `ahead` steps, where that might come too late.
    """

    def __init__(
        self,
        world: World,
        sampler: Sampler,
        reader: Reader,
        service: PlanService | None,
        costs: CostModel,
        *,
        first: int,
        last: int,
        ahead: int,
    ) -> None:
        """`service`: rank 0's; it alone plans."""
        self._world, self._sampler, self._reader = world, sampler, reader
        self._service, self._costs = service, costs
        self._numbers = range(first + 1, last + 1)
        self._queue: queue.Queue[_Prepared | BaseException] = queue.Queue()
        self._ahead, self._taken, self._allowed = ahead, first, first + 1
        """Steps up to this one may be planned; only rank 0 asks, the others follow it."""
        self._preparations: deque[float] = deque(maxlen=PREPARATIONS)
        self._changed = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="heteromesh-plans", daemon=True)
        self._thread.start()

    def next(self, number: int) -> Assignment:
        """Returns step `number`, which follows the one before. Raises PlanningFailed."""
        start = time.perf_counter()
        item = self._queue.get()
        end = time.perf_counter()
        if isinstance(item, BaseException):
            raise item
        assert item.assignment.number == number
        self._taken += 1
        self._allow(item.assignment)
        return self._timed(item, start, end)

    def close(self) -> None:
        """Ends the thread. Every rank must call it after the same step."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _allow(self, taken: Assignment) -> None:
        assert taken.step is not None
        with self._changed:
            late = LATE_FACTOR * max(self._preparations) > taken.step.seconds
            self._allowed = max(self._allowed, self._taken + (self._ahead if late else 1))
            self._changed.notify()

    def _timed(self, item: _Prepared, start: float, end: float) -> Assignment:
        """Returns the assignment with the seconds that were waited for its plan and its tensors."""
        for name, category, until, since in (
            ("wait for the plan", "plan", item.planned_at, start),
            ("wait for data", "data", item.ready_at, max(start, item.planned_at)),
        ):
            if until > since:
                ago = int((end - since) * 1e9)
                self._world.recorder.add(name, category, time.time_ns() - ago, int((until - since) * 1e9))  # type: ignore[arg-type]
        plan_wait = max(0.0, min(item.planned_at, end) - start)
        data_wait = max(0.0, end - start - plan_wait)
        return replace(item.assignment, plan_wait_seconds=plan_wait, data_wait_seconds=data_wait)

    def _run(self) -> None:
        try:
            for number in self._numbers:
                self._await_room(number)
                began = time.perf_counter()
                planned = self._world.broadcast(self._decide(number) if self._world.rank == 0 else None)
                if isinstance(planned, UserError):
                    self._queue.put(PlanningFailed(planned))
                    return
                if planned is None:
                    return
                prepared = self._prepare(number, planned)
                with self._changed:
                    self._preparations.append(prepared.ready_at - began)
                self._queue.put(prepared)
        except BaseException as error:
            self._queue.put(error)

    def _await_room(self, number: int) -> None:
        with self._changed:
            while self._world.rank == 0 and number > self._allowed and not self._stop:
                self._changed.wait()

    def _decide(self, number: int) -> _Planned | UserError | None:
        if self._stop:
            return None
        assert self._service is not None
        batch, members = self._sampler.next_batch(), self._world.members
        costs, correction = self._costs.of(members), self._costs.correction(members)
        try:
            step = self._service.plan(Question(number, batch.lengths, members), costs, correction)
        except UserError as error:
            return error
        return _Planned(batch, step, correction, correction.applied(costs).speeds)

    def _prepare(self, number: int, planned: _Planned) -> _Prepared:
        at, batch = time.perf_counter(), planned.batch
        inputs = self._reader.step_inputs(planned.step, batch.sequences, self._world.rank)
        valid = torch.tensor([sum(p.valid for p in inputs.values())])
        assignment = Assignment(
            number=number,
            batch=batch,
            places=tuple(range(len(batch.lengths))),
            step=planned.step,
            inputs=inputs,
            divisor=max(1, int(self._world.sum_ahead(valid))),
            speeds=planned.speeds,
            correction=planned.correction,
        )
        return _Prepared(assignment, at, time.perf_counter())
