"""What runs the tasks of a step: threads, or one after the other on a virtual clock. CUDA's streams: cuda_lanes.py."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from heteromesh.planner.ownership.offload import OffloadPlan
from heteromesh.planner.ownership.offload_rates import OffloadRates
from heteromesh.planner.ownership.offload_tasks import Lane, LaneTask, play, task_seconds

Work = Callable[[LaneTask], None]


class Lanes(Protocol):
    """Runs tasks, each lane's in the order given and after those that each task waits for."""

    def run(self, plan: OffloadPlan, tasks: Sequence[LaneTask], work: Work) -> None:
        """Does the work of all tasks; returns when whoever calls may use the results.

        Raises what a task raised, after all that were under way have ended; tasks that come after it are not begun.
        """

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Starts a copy to host memory between steps; the next step begins after it. Not to be waited for here."""
        target.copy_(source)

    def settle(self) -> None:
        """Returns when state in host memory may be read by this thread."""
        return

    def memory(self, numel: int) -> torch.Tensor:
        """Returns fp32 memory (n,) on the host that this lane's transfers can use, zeros."""
        return torch.zeros(numel)


class ThreadLanes(Lanes):
    """A thread for each lane that a step uses, for the step."""

    def run(self, plan: OffloadPlan, tasks: Sequence[LaneTask], work: Work) -> None:
        queues: dict[Lane, list[int]] = defaultdict(list)
        for number, task in enumerate(tasks):
            queues[task.lane].append(number)
        step = _Step(tasks, self._perform(tasks, work))
        others = []
        for queue in list(queues.values())[1:]:
            thread = threading.Thread(target=step.run, args=(queue,), daemon=True)
            try:
                thread.start()
                others.append(thread)
            except RuntimeError as error:  # no more threads to be had
                step.error = step.error or error
                step.run(queue)
        for queue in list(queues.values())[:1]:
            step.run(queue)
        for thread in others:
            thread.join()
        if step.error is not None:
            raise step.error

    def _perform(self, tasks: Sequence[LaneTask], work: Work) -> Callable[[int], None]:
        """Returns what does a task by its number."""
        return lambda number: work(tasks[number])


class _Step:
    """One step's tasks under way."""

    def __init__(self, tasks: Sequence[LaneTask], perform: Callable[[int], None]) -> None:
        self._tasks, self._perform = tasks, perform
        self._ended = [threading.Event() for _ in tasks]
        self.error: BaseException | None = None

    def run(self, queue: Sequence[int]) -> None:
        """Does one lane's tasks. Tasks are numbered so that none waits for a later one: somebody can always go on."""
        for number in queue:
            for before in self._tasks[number].after if self.error is None else ():
                self._ended[before].wait()
            try:
                if self.error is None:
                    with torch.no_grad():  # this thread's own
                        self._perform(number)
            except BaseException as error:
                self.error = self.error or error
            finally:
                self._ended[number].set()


class SimulatedLanes(Lanes):
    """Does all arithmetic at once, in the order of the tasks, and tells how long lanes of these rates would take."""

    def __init__(self, rates: OffloadRates) -> None:
        self._rates = rates
        self.seconds = 0.0
        """Of all steps so far."""
        self.spans: list[tuple[float, float]] = []
        """When each task of the last step began and ended, seconds from the step's start."""

    def run(self, plan: OffloadPlan, tasks: Sequence[LaneTask], work: Work) -> None:
        for task in tasks:
            work(task)
        subgroups = [plan.subgroups[task.subgroup] for task in tasks]
        seconds = [task_seconds(t, s.numel, s.tier, self._rates) for t, s in zip(tasks, subgroups, strict=True)]
        self.spans = play(tasks, seconds)
        self.seconds += max((end for _, end in self.spans), default=0.0)
