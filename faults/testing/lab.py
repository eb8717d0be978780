"""A job of worker processes on this machine that does nothing but checked steps, for tests and measurements of faults.

Every worker's contributions are the digits of faults/testing/oracle.py, every committed result is compared with what
its contributor set must give, and every commit is reported to the supervising process with its time.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.group import EpochGroup
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.membership.view import Fenced, Stopped
from heteromesh.faults.testing import oracle
from heteromesh.faults.testing.oracle import CommitEvent, History
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.faults.wire.discovery import Address


@dataclass(frozen=True, kw_only=True, slots=True)
class LabWork:
    """What every worker of a lab does."""

    bytes: int = 1 << 20
    """Of each all-reduce."""
    collectives: bool = False
    """Each step runs all the collectives, in-place sums too, not the sum alone."""
    pause: float = 0.0
    """Seconds of sleep between two steps: the place of a forward and backward."""
    dtype: torch.dtype = torch.int64
    links: int = 1


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process, as the supervisor sees it."""

    slot: int
    process: Any
    pipe: Connection
    member: int = -1
    events: list[CommitEvent] = field(default_factory=list)
    ended: str = ""
    """How its loop ended: "fenced: ...", or an error's text."""


class Lab:
    """A coordinator (in a process of its own) and workers; a context manager that leaves nothing behind."""

    def __init__(
        self, work: LabWork, *, size: int, min_members: int = 1, timing: Timing | None = None, elective: bool = False
    ) -> None:
        """`elective`: the members know more addresses and elect another coordinator when they lose theirs."""
        self.work, self.secret = work, os.urandom(16)
        self.timing = timing or Timing()
        self._context = multiprocessing.get_context("forkserver")
        self.workers: list[Worker] = []
        self.retired: list[Worker] = []
        self._size, self._min, self._elective = size, min_members, elective
        self._vacant: list[int] = []
        self.evicted = 0
        """Workers that were put out although nothing was done to them: a machine too loaded for the deadlines."""

    def __enter__(self) -> Lab:
        source, sink = self._context.Pipe(duplex=True)
        bounds = Bounds(min=self._min)
        self._coordinator = self._context.Process(
            target=_coordinate, args=(sink, self.secret, bounds, self.timing), daemon=True
        )
        self._coordinator.start()
        sink.close()
        self._told = source
        self.addresses = [source.recv()]
        if self._elective:
            self.addresses += _free(self._size)
        try:
            for slot in range(self._size):
                self.add(slot)
            self.settle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self.workers, *self.retired]:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._coordinator.kill()
        self._coordinator.join()
        self._told.close()

    def counts(self) -> dict[str, int]:
        """Returns what the coordinator has counted."""
        self._told.send("counts")
        return dict(self._told.recv())

    @property
    def coordinator(self) -> int:
        """Returns the process id of the first one; `elected` has the later ones."""
        return int(self._coordinator.pid or 0)

    @property
    def elected(self) -> Worker | None:
        """Returns the worker in whose process the coordinator runs; None while the first one does."""
        return next((w for w in self.workers if w.events and w.events[-1].coordinates), None)

    @property
    def first(self) -> Worker:
        """Returns the worker that has rank 0."""
        slots = next(w.events[-1].slots for w in self.workers if w.events)
        return next(w for w in self.workers if w.slot == slots[0])

    def interruption(self, since: float, seconds: float = 30.0) -> float | None:
        """Seconds from `since`, when the coordinator was lost, until every worker has committed a step in an epoch of
        another one; None: a hang."""
        epochs = [e.epoch for w in self.workers for e in w.events if e.time <= since]

        def after(worker: Worker) -> float | None:
            return next((e.time for e in worker.events if e.time > since and e.epoch > max(epochs)), None)

        if not self.until(lambda: all(after(w) is not None for w in self.workers), seconds):
            return None
        return max(after(w) or since for w in self.workers) - since

    def history(self) -> History:
        """Returns every commit so far, of the dead too."""
        return History([event for worker in [*self.retired, *self.workers] for event in worker.events])

    def add(self, slot: int, *, ballast: int = 0) -> Worker:
        """Starts a worker in a free slot; it joins when it gets there. `ballast`: bytes of touched memory it holds."""
        source, sink = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work, args=(sink, slot, self.addresses, self.secret, self.work, ballast), daemon=True
        )
        process.start()
        sink.close()
        worker = Worker(slot, process, source)
        self.workers.append(worker)
        return worker

    def pump(self, seconds: float) -> None:
        """Reads the workers' reports for some time."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._read(left)

    def until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Reads reports until `done()`; False when that took longer than `seconds`."""
        limit = time.monotonic() + seconds
        while not done():
            left = limit - time.monotonic()
            if left <= 0:
                return False
            self._read(min(left, 0.05))
        return True

    def settle(self, seconds: float = 30.0) -> None:
        """Returns when every worker takes part in the same epoch. Who was put out by mistake is replaced.

        Raises TimeoutError.
        """

        def together() -> bool:
            slots = {w.slot for w in self.workers}
            for slot in set(self._vacant) - slots:
                self.add(slot)
            slots.update(self._vacant)
            self._vacant.clear()
            return all(w.events and set(w.events[-1].slots) == slots for w in self.workers)

        if not self.until(together, seconds):
            raise TimeoutError(f"the workers did not come together in {seconds:g} s: {self.describe()}")

    def recovery(self, victim: Worker, since: float, seconds: float = 30.0) -> float | None:
        """Seconds from `since` until every other worker has committed a step without the victim; None: a hang.

        The victim is retired.
        """
        self.workers.remove(victim)
        self.retired.append(victim)

        def after(worker: Worker) -> float | None:
            return next((e.time for e in worker.events if e.time > since and victim.slot not in e.slots), None)

        if not self.until(lambda: all(after(w) is not None for w in self.workers), seconds):
            return None
        return max((after(w) or since for w in self.workers), default=since) - since

    def retire(self, worker: Worker) -> None:
        """Ends a worker without measuring anything."""
        worker.process.kill()
        worker.process.join()
        self.workers.remove(worker)
        self.retired.append(worker)

    def describe(self) -> str:
        """Returns the workers and their last commits, for messages."""
        return "; ".join(
            f"slot {w.slot} ({w.ended or ('alive' if w.process.is_alive() else 'dead')}): "
            + (f"step {w.events[-1].step} epoch {w.events[-1].epoch}" if w.events else "no commit")
            for w in self.workers
        )

    def _read(self, seconds: float) -> None:
        pipes = {w.pipe: w for w in [*self.workers, *self.retired] if not w.pipe.closed}
        for pipe in wait(list(pipes), seconds):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                report = worker.pipe.recv()
            except (EOFError, OSError):
                worker.pipe.close()
                continue
            if isinstance(report, CommitEvent):
                worker.member = report.member
                worker.events.append(report)
            else:
                worker.ended = report
                if worker in self.workers and report.startswith("Fenced"):
                    self.workers.remove(worker)
                    self.retired.append(worker)
                    self._vacant.append(worker.slot)
                    self.evicted += 1


def _free(count: int) -> list[Address]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[:2] for sock in sockets]


def _coordinate(pipe: Connection, secret: bytes, bounds: Bounds, timing: Timing) -> None:
    coordinator = Coordinator(secret, bounds=bounds, timing=timing).start()
    pipe.send(coordinator.address)
    while True:
        pipe.recv()
        pipe.send(dict(coordinator.membership.counts))


def _work(pipe: Connection, slot: int, addresses: list[Address], secret: bytes, work: LabWork, ballast: int) -> None:
    torch.set_num_threads(1)
    held = torch.ones(ballast, dtype=torch.uint8)
    member = Member(JoinOptions(coordinators=addresses, secret=secret, name=str(slot), links=work.links))
    try:
        _loop(pipe, slot, member, work)
    except BrokenPipeError:
        pass  # nobody supervises any more
    except (Fenced, Stopped) as error:
        pipe.send(f"{type(error).__name__}: {error}")
    except Exception as error:
        pipe.send(f"failed: {type(error).__name__}: {error}")
        raise
    finally:
        del held
        member.close()


def _loop(pipe: Connection, slot: int, member: Member, work: LabWork) -> None:
    group = member.group()
    tally = torch.zeros(1, dtype=torch.int64)
    steps = Steps(group, lambda: [tally])
    count = work.bytes // work.dtype.itemsize
    patterns = [oracle.contribution(slot, phase, count, work.dtype) for phase in range(4)]
    steps.start()
    while True:
        mine = patterns[steps.step % 4]
        if work.collectives:
            done = steps.atomic(lambda group, mine=mine: _everything(group, slot, mine))  # type: ignore[misc]
            step, epoch, digest, attempts = done.step, done.view.epoch, done.digest, done.attempts
            slots = tuple(int(name) for name in done.view.names)
            values = done.result
        else:
            commit = steps.reduce([mine])
            step, epoch, digest, attempts = commit.step, commit.epoch, commit.digest, commit.attempts
            slots = tuple(int(name) for name in commit.names)
            values = commit.sums[0]
        now = time.monotonic()
        right = bool(torch.equal(values, oracle.expected(slots, step, count, work.dtype)))
        right = right and int(tally) == step  # the state that a joiner was given
        tally += 1
        chain = group.committed()[1]
        told = CommitEvent(member.id, slot, now, step, epoch, digest, chain, right, attempts, slots, member.coordinates)
        pipe.send(told)
        if work.pause:
            time.sleep(work.pause)


def _everything(group: EpochGroup, slot: int, mine: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Calls every collective once, each checked; the sum in place and out of place."""
    view = group.view
    rank, size = view.rank, view.size
    out = torch.empty_like(mine)
    summed = group.all_reduce(mine, out)
    twice = mine.clone()
    group.all_reduce(twice)
    wrong = [] if torch.equal(out, twice) else ["in-place sum"]
    ids = [torch.full((100 + r,), -1, dtype=torch.int64) for r in range(size)]
    ids[rank].fill_(view.members[rank])
    group.all_gather(ids)
    if any(int(ids[r].min()) != m or int(ids[r].max()) != m for r, m in enumerate(view.members)):
        wrong.append("all-gather")
    word = torch.full((40_000,), rank if rank == size - 1 else -1)
    group.broadcast(word, size - 1)
    if int(word.min()) != size - 1 or int(word.max()) != size - 1:
        wrong.append("broadcast")
    if wrong:
        out.fill_(-1)  # the oracle will not take that for a sum
    return out, summed.digest
