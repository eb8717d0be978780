"""The threads that move collectives on while the caller computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

from heteromesh.comm.collectives.schedule import PieceStep, ReductionSchedule, StageTask
from heteromesh.comm.interfaces import Work

WINDOW_SECONDS = 0.05
LEAST_WINDOW, MOST_WINDOW = 512 << 10, 64 << 20


def window(seconds_per_byte: float) -> int:
    """Returns how many bytes of tensors may be on their way through others before more is sent, at this pace.

    Sending everything at once would let some connections run far ahead of others, whose pieces then come late, and
    keep results waiting behind contributions (20 MB, 2 hosts of 1 Gbit/s and 2 of 200 Mbit/s: 0.98 s with 4 MiB,
    0.90 s with 1 MiB); too little would leave links idle while a message makes its round.
    """
    return max(min(int(WINDOW_SECONDS / max(seconds_per_byte, 1e-12)), MOST_WINDOW), LEAST_WINDOW)


class CollectiveEngine:
    """Runs schedules in the order given: one thread posts their sends, one for each stage does their tasks.

    The tasks of a stage are done in order, which is the same on every rank, and no stage waits for a later one, so
    ranks can't wait for each other in a circle. After the first error nothing more is done.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self.error: BaseException | None = None
        self._schedules: SimpleQueue[tuple[ReductionSchedule, threading.Event] | None] = SimpleQueue()
        self._stages: dict[int, SimpleQueue[StageTask | None]] = {}
        self._threads: list[threading.Thread] = []
        self._under_way: deque[tuple[Callable[[], object], int]] = deque()
        self._bytes = 0

    def start(self, schedule: ReductionSchedule) -> Callable[[], None]:
        """Posts the schedule's receives; the result waits until all of it is done and raises what went wrong."""
        if not self._threads:
            self._start_thread(self._run)
        ended = threading.Event()
        schedule.post()
        for task in schedule.tasks:
            self._stage(task.stage).put(task)
        self._schedules.put((schedule, ended))

        def finish() -> None:
            ended.wait()
            if self.error is not None:
                raise self.error

        return finish

    def close(self) -> None:
        """Ends the threads when what they wait for has come or failed."""
        self._schedules.put(None)
        for queue in self._stages.values():
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._stages.clear()

    def _run(self) -> None:
        while True:
            try:
                item = self._schedules.get(block=not self._under_way)
            except Empty:
                self._retire()
                continue
            if item is None:
                break
            self._run_schedule(*item)
            del item  # its tensors are the caller's: they must not wait here for the next one
        while self._under_way:
            self._retire()

    def _run_schedule(self, schedule: ReductionSchedule, ended: threading.Event) -> None:
        for step in schedule.steps:
            while self._under_way and self._bytes + step.nbytes > self._window:
                self._retire()
            self._send(schedule, step)
        self._under_way.append((lambda: self._end(schedule, ended), 0))

    def _send(self, schedule: ReductionSchedule, step: PieceStep) -> None:
        works: list[Work] = []

        def send() -> None:
            works.extend(schedule.send(*message) for message in step.sends)

        def arrive() -> None:
            if step.arrived is not None:
                step.arrived()
            for work in works:
                work.wait()

        self._try(send)
        self._under_way.append((lambda: self._try(arrive), step.nbytes))
        self._bytes += step.nbytes

    def _retire(self) -> None:
        wait, nbytes = self._under_way.popleft()
        self._bytes -= nbytes
        wait()

    def _end(self, schedule: ReductionSchedule, ended: threading.Event) -> None:
        for task in schedule.tasks:
            task.ended.wait()
        for work in schedule.sends:
            self._try(work.wait)
        ended.set()

    def _stage(self, stage: int) -> SimpleQueue[StageTask | None]:
        if stage not in self._stages:
            queue: SimpleQueue[StageTask | None] = SimpleQueue()
            self._stages[stage] = queue
            self._start_thread(lambda: self._work(queue))
        return self._stages[stage]

    def _work(self, queue: SimpleQueue[StageTask | None]) -> None:
        while (task := queue.get()) is not None:
            for work in task.waits:
                self._try(work.wait)
            self._try(task.act)
            task.ended.set()
            del task  # as above

    def _try(self, act: Callable[[], object]) -> None:
        if self.error is None:
            try:
                act()
            except BaseException as error:
                self.error = self.error or error

    def _start_thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="collectives", daemon=True)
        thread.start()
        self._threads.append(thread)
