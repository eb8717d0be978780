"""The agent of one host: keeps its workers running while some of them die, and ends with them.

Unlike torchrun's agent it never restarts a worker because another one died: the others go on by themselves
(docs/faults.md), and a worker that is started again joins them.
"""

from __future__ import annotations

import math
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.runtime.launch.countdown import Countdown
from heteromesh.runtime.launch.reaper import Reaper
from heteromesh.runtime.launch.worker import ExitStatus, WorkerProcess
from heteromesh.runtime.process.interrupt import AGAIN_SECONDS, handled

_PAUSE = 1.0
"""Seconds before a worker is started again."""
_TURN = 0.2
"""Seconds after which the agent looks around although nothing has happened."""
_STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
"""Exit codes of a worker that was asked to stop, here or on another host, and has saved."""
_SENTENCES = ("UserError", "PeerLost", "JobOver")
"""Exceptions whose message says all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSpec:
    """What the agent of one host has to do."""

    command: Sequence[str]
    environments: Sequence[dict[str, str]]
    """Of each worker."""
    names: Sequence[str]
    """Of each worker, as the coordinator knows it."""
    max_restarts: int
    """For each worker."""
    signals: Sequence[int]
    """That end the job."""
    grace: float
    """Seconds from such a signal, or from the first worker that is done, to SIGKILL."""


def say(text: str) -> None:
    """Prints one line for people."""
    print(f"heteromesh: {text}", file=sys.stderr, flush=True)


class Agent:
    """Made for one `run`."""

    def __init__(self, spec: AgentSpec, *, coordinator: Coordinator | None, patience: float) -> None:
        """`coordinator`: the one that this process serves, if any. `patience`: seconds for the first members."""
        self._spec, self._coordinator = spec, coordinator
        self._countdown = Countdown(coordinator, patience, say) if coordinator is not None else None
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._code: int | None = None
        """Decided before all workers have ended."""
        self._done_at: float | None = None
        """When the first worker ended with 0."""
        self._finish_at = math.inf
        """When that was decided."""
        self._told: set[str] = set()
        self._events_refused = False
        """Whether the run directory did not take events."""

    def run(self) -> int:
        """Returns the exit code when every worker has ended. Raises UserError when the command can't be started."""
        with ExitStack() as stack:
            reaper = Reaper()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="heteromesh-")))
            reaper.remove_at_the_end(str(folder))
            stack.callback(reaper.close)
            stack.callback(self._clean)
            stack.enter_context(self._selector)
            signals = _Signals()
            stack.enter_context(signals.caught(self._spec.signals))
            self._selector.register(signals, selectors.EVENT_READ, signals)
            self._workers = [WorkerProcess(rank, name, folder, reaper) for rank, name in enumerate(self._spec.names)]
            while any(worker.open for worker in self._workers):
                self._turn()
            self._serve_others()
        return self._result()

    def _turn(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.due is not None and worker.due <= now:
                self._start(worker)
        soonest = min([now + _TURN, *(worker.due for worker in self._workers if worker.due is not None)])
        for key, _ in self._selector.select(max(0.0, soonest - now)):
            if isinstance(key.data, WorkerProcess):
                self._selector.unregister(key.fd)
                self._ended(key.data, key.data.reap())
            else:
                self._interrupted(key.data.read())
        self._look(time.monotonic())

    def _start(self, worker: WorkerProcess) -> None:
        try:
            worker.start(self._spec.command, self._spec.environments[worker.rank])
        except OSError as error:
            raise UserError(
                f"{self._spec.command[0]} can't be started ({error.strerror}): give a script or a program of this host"
            ) from None
        self._selector.register(worker, selectors.EVENT_READ, worker)

    def _ended(self, worker: WorkerProcess, status: ExitStatus) -> None:
        if status.code == 0:
            self._done_at = self._done_at or time.monotonic()
            for other in self._workers:
                other.due = None  # the job is done: nobody would take part any more
            return
        final = status.code == 2 or self._is_over(status)
        if final:
            self._tell(worker, status)
        if self._code is not None:
            return
        if self._done_at is not None:
            if not final:
                say(f"worker {worker.name} {status.reason} after the first worker was done")
        elif status.code in _STOPPED:
            self._finish(status.code, signal.SIGTERM)
        elif not final:
            self._lost(worker, status)
        elif status.code == 1 or worker.starts == 1:
            # one that was started again and is refused now, for a file that has changed, must not end the others
            self._finish(status.code, signal.SIGTERM)

    def _is_over(self, status: ExitStatus) -> bool:
        """Whether no worker of the job can go on, so that starting one again won't help."""
        if status.code != 1 or status.kind not in ("JobOver", "PeerLost"):
            return False
        # PeerLost may mean that the others have put out this one worker, or that nobody holds the state any more: those
        # that are started again begin at the last checkpoint. Without a coordinator they have nothing to join.
        return status.kind == "JobOver" or (self._coordinator is not None and not self._coordinator.running)

    def _lost(self, worker: WorkerProcess, status: ExitStatus) -> None:
        worker.lost, used = True, worker.starts - 1
        if used < self._spec.max_restarts:
            worker.due = time.monotonic() + _PAUSE
            what = f"it is started again ({used + 1} of {self._spec.max_restarts} times)"
        else:
            left = sum(other.open for other in self._workers)
            what = f"it is not started again (--max-restarts {self._spec.max_restarts}); {left} of this host go on"
        say(f"worker {worker.name} {status.reason}: {what}")

    def _tell(self, worker: WorkerProcess, status: ExitStatus) -> None:
        """Says its sentence, once for all workers that ended with the same."""
        text = status.message
        if status.kind not in _SENTENCES:
            text = f"worker {worker.name} {status.reason}"
        if text not in self._told:
            self._told.add(text)
            say(f"error: {text}")

    def _interrupted(self, numbers: bytes) -> None:
        for number in numbers:
            if self._code is None:
                # workers save and end on these two; others would end them at once
                self._finish(128 + number, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            elif number == signal.SIGINT and time.monotonic() > self._finish_at + AGAIN_SECONDS:
                self._kill()

    def _finish(self, code: int, number: int) -> None:
        """Ends the job of this host; the first reason counts."""
        if self._code is not None:
            return
        self._code, self._finish_at = code, time.monotonic()
        for worker in self._workers:
            worker.due = None
            worker.signal(number)

    def _keep_events(self) -> None:
        """Writes events to the run directory (`elastic_facts` tell where), once a step shows that it is this job's."""
        coordinator = self._coordinator
        if coordinator is None or coordinator.monitor.events.kept or self._events_refused:
            return
        place = coordinator.membership.facts.get("run_dir")
        if place and coordinator.membership.counts["commits"]:
            try:
                coordinator.monitor.events.keep_in(Path(place))
            except UserError as error:
                self._events_refused = True
                say(f"events are not kept: {error}")

    def _look(self, now: float) -> None:
        self._keep_events()
        if now >= self._finish_at + self._spec.grace:
            self._kill()
        if self._done_at is not None and self._code is None and now >= self._done_at + self._spec.grace:
            late = ", ".join(worker.name for worker in self._workers if worker.open)
            say(f"{late} did not end within {self._spec.grace:g} s after the first worker was done")
            self._finish(self._verdict(), signal.SIGTERM)
        if self._countdown is not None and self._code is None and self._done_at is None:
            coming = [worker.name for worker in self._workers if worker.open]
            reason = self._countdown.look(now, coming)
            if reason:
                say(f"error: {reason}")
                self._finish(1, signal.SIGTERM)

    def _serve_others(self) -> None:
        """Members on other hosts may still need the coordinator of this process for their last step, or for more."""
        coordinator = self._coordinator
        if coordinator is None or self._code in (1, 2):
            return
        limit = math.inf
        if self._code is not None or self._done_at is not None:
            limit = time.monotonic() + coordinator.timing.leave
        elif coordinator.membership.people:
            say("no worker of this host is left; the agent stays for the members on other hosts")
        while coordinator.running and coordinator.membership.people and time.monotonic() < limit:
            for key, _ in self._selector.select(_TURN):
                self._interrupted(key.data.read())
                return

    def _result(self) -> int:
        if self._code is not None:
            return self._code
        return self._verdict()

    def _verdict(self) -> int:
        """Returns 0 if one worker was done, and every one that had not been lost before was too."""
        codes = [worker.exit_status.code if worker.exit_status else None for worker in self._workers]
        if self._done_at is not None:
            return int(any(code != 0 and not w.lost for w, code in zip(self._workers, codes, strict=True)))
        return 2 if 2 in codes else 1

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _clean(self) -> None:
        self._kill()
        for worker in self._workers:
            if worker.running:
                worker.reap()


class _Signals:
    """Signals as bytes to be read, while `caught` is entered, instead of what they usually do. For the main thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    @contextmanager
    def caught(self, numbers: Sequence[int]) -> Iterator[None]:
        """Takes these signals; closes the sockets at the end."""
        with self._reader, self._writer:
            wakeup = signal.set_wakeup_fd(self._writer.fileno())
            try:
                with handled(numbers, lambda *_: None):
                    yield
            finally:
                signal.set_wakeup_fd(wakeup)

    def fileno(self) -> int:
        return self._reader.fileno()

    def read(self) -> bytes:
        """Returns the numbers that have come."""
        try:
            return self._reader.recv(64)
        except BlockingIOError:
            return b""
