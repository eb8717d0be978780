"""Plans and tensors ahead of the training loop: a thread per rank, rank 0's asks the planner and tells the others."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.plan import Step
from heteromesh.runtime.work.reader import PassInput, Reader
from heteromesh.runtime.work.sampler import Batch

LATE = 3
"""Of a step's predicted seconds: a plan that takes a third of it may come too late, as predictions err."""
PREPARATIONS = 4
"""Of late steps, whose longest counts."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A batch and how it will be trained."""

    batch: Batch
    step: Step
    correction: Correction
    """Of the costs, with which the step was planned."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A planned step with this rank's tensors."""

    batch: Batch
    step: Step
    correction: Correction
    inputs: dict[int, PassInput]
    valid_tokens: int
    """Of the whole step."""
    planned_at: float
    """time.perf_counter() when the plan was here."""
    ready_at: float


class PlanningFailed(Exception):
    """A step can't be planned; every rank is told so at the same step."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class PlanFeed:
    """Prepares steps first..last (excluded). `propose(index)` is called on rank 0 only, in the thread.

    A step is planned while the one before it runs, so that the plan knows what passes lately took; earlier, at most
    `ahead` steps, where that might come too late.
    """

    def __init__(
        self, world: World, reader: Reader, propose: Callable[[int], Planned], first: int, last: int, ahead: int
    ) -> None:
        self._world, self._reader, self._propose = world, reader, propose
        self._range = range(first, last)
        self._queue: queue.Queue[Prepared | BaseException] = queue.Queue()
        self._ahead, self._taken, self._allowed = ahead, first, first + 1
        """Steps before this one may be planned; only rank 0 asks, the others follow it."""
        self._preparations: deque[float] = deque(maxlen=PREPARATIONS)
        self._changed = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="heteromesh-plans", daemon=True)
        self._thread.start()

    def next(self) -> tuple[Prepared, float, float]:
        """The next step, and the seconds waited for its plan and for its data."""
        start = time.perf_counter()
        item = self._queue.get()
        end = time.perf_counter()
        if isinstance(item, BaseException):
            raise item
        self._taken += 1
        with self._changed:
            late = LATE * max(self._preparations) > item.step.seconds
            self._allowed = max(self._allowed, self._taken + (self._ahead if late else 1))
            self._changed.notify()
        for name, category, until, since in (
            ("wait for the plan", "plan", item.planned_at, start),
            ("wait for data", "data", item.ready_at, max(start, item.planned_at)),
        ):
            if until > since:
                ago = int((end - since) * 1e9)
                self._world.recorder.add(name, category, time.time_ns() - ago, int((until - since) * 1e9))  # type: ignore[arg-type]
        plan_wait = max(0.0, min(item.planned_at, end) - start)
        return item, plan_wait, max(0.0, end - start - plan_wait)

    def close(self) -> None:
        """Ends the thread. Every rank must call it after the same step."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            for index in self._range:
                self._await_room(index)
                began = time.perf_counter()
                planned = self._world.broadcast(self._decide(index) if self._world.rank == 0 else None)
                if isinstance(planned, UserError):
                    self._queue.put(PlanningFailed(planned))
                    return
                if planned is None:
                    return
                prepared = self._prepare(planned)
                with self._changed:
                    self._preparations.append(prepared.ready_at - began)
                self._queue.put(prepared)
        except BaseException as error:
            self._queue.put(error)

    def _await_room(self, index: int) -> None:
        with self._changed:
            while self._world.rank == 0 and index >= self._allowed and not self._stop:
                self._changed.wait()

    def _decide(self, index: int) -> Planned | UserError | None:
        if self._stop:
            return None
        try:
            return self._propose(index)
        except UserError as error:
            return error

    def _prepare(self, planned: Planned) -> Prepared:
        at = time.perf_counter()
        inputs = self._reader.step_inputs(planned.step, planned.batch.sequences, self._world.rank)
        valid = torch.tensor([sum(p.valid for p in inputs.values())])
        return Prepared(
            batch=planned.batch,
            step=planned.step,
            correction=planned.correction,
            inputs=inputs,
            valid_tokens=int(self._world.sum_ahead(valid)),
            planned_at=at,
            ready_at=time.perf_counter(),
        )
