"""A job in the sandbox: output by line, faults on time, one host's failure the end of all."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import IO

from heteromesh.runtime.sandbox.faults import Event, Fault, schedule
from heteromesh.runtime.sandbox.process import Process
from heteromesh.runtime.sandbox.sandbox import Sandbox

Sink = Callable[[str, bool, bytes], None]
"""Takes (host, whether it is standard error, a line with its end); called by one thread at a time."""
GRACE_SECONDS = 10.0
"""For the others to end by themselves after one host failed or only lost hosts are left."""
LOOK_SECONDS = 0.5
"""How often the sink is looked after."""
TERM_SECONDS = 10.0
"""From SIGTERM to SIGKILL."""


class SandboxJob:
    """One command on every host. Without faults, the first host that fails ends all; with faults, hosts go on."""

    def __init__(
        self,
        sandbox: Sandbox,
        command: Sequence[str],
        *,
        faults: Sequence[Fault] = (),
        sink: Sink | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._events = schedule(faults, sandbox)
        self._scripted = bool(faults)
        self._tell = tell
        self.statuses: dict[str, int] = {}
        """Exit status by host, in the order in which they ended; 128 + n when signal n ended it."""
        self.lost: set[str] = set()
        """Hosts that a fault took out: their exit status doesn't count unless none is left."""
        self._lock = threading.Lock()
        self._deaf: OSError | None = None
        self._began = time.monotonic()
        self._processes = sandbox.start(command, piped=sink is not None)
        self._readers = [
            threading.Thread(target=self._read, args=(stream, sink, process.host, error), daemon=True)
            for process in self._processes
            if process.streams and sink
            for error, stream in zip((False, True), process.streams, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def failed(self) -> str:
        """Returns the first host that counts and ended with another status than 0; empty: none."""
        counted = {h: s for h, s in self.statuses.items() if h not in self.lost} or self.statuses
        return next((host for host, status in counted.items() if status), "")

    def wait(self, timeout: float | None = None) -> int:
        """Returns the first exit status that is not 0, else 0. Ends all processes.

        Raises subprocess.TimeoutExpired, and OSError where the sink can't write (nobody reads any more).
        """
        deadline = time.monotonic() + timeout if timeout is not None else None
        try:
            self._watch(deadline)
        except BaseException:
            self.end()
            raise
        self._drain()
        for event in self._events:
            self._tell(f"the job was over before {event.at:g} s: {event.text}")
        return self.statuses[self.failed] if self.failed else 0

    def end(self) -> None:
        """Sends SIGTERM, then SIGKILL."""
        running = [p for p in self._processes if p.poll() is None]
        try:
            for process in running:
                process.signal(signal.SIGCONT, everyone=True)
                process.terminate()
            until = time.monotonic() + TERM_SECONDS
            for process in running:
                try:
                    process.wait(max(0.0, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        finally:
            for process in running:
                process.close()
            for process in running:
                process.kill()
                self.statuses.setdefault(process.host, process.wait())
            self._drain()

    def _watch(self, deadline: float | None) -> None:
        end: float | None = None
        with selectors.DefaultSelector() as selector, ExitStack() as stack:
            for process in self._processes:
                handle = os.pidfd_open(process.pid)
                stack.callback(os.close, handle)
                selector.register(handle, selectors.EVENT_READ, process)
            while selector.get_map():
                due = self._began + self._events[0].at if self._events else None
                soonest = min(t for t in (end, deadline, due, time.monotonic() + LOOK_SECONDS) if t is not None)
                for key, _ in selector.select(max(0.0, soonest - time.monotonic())):
                    selector.unregister(key.fd)
                    self._ended(key.data)
                if self._deaf:
                    raise self._deaf
                now = time.monotonic()
                while self._events and self._events[0].at <= now - self._began:
                    self._apply(self._events.pop(0))
                if deadline is not None and now >= deadline:
                    raise subprocess.TimeoutExpired("sandbox", deadline - self._began)
                if end is None and selector.get_map() and self._is_over(selector):
                    end = now + GRACE_SECONDS
                if end is not None and now >= end:
                    self.end()
                    return

    def _is_over(self, selector: selectors.BaseSelector) -> bool:
        """Whether what still runs is only waited for, for a while."""
        if not self._scripted:
            return bool(self.failed)
        left = {key.data.host for key in selector.get_map().values()}
        return left <= self.lost

    def _ended(self, process: Process) -> None:
        self.statuses[process.host] = process.wait()

    def _apply(self, event: Event) -> None:
        event.apply()
        if event.lost:
            self.lost.add(event.lost)
        self._tell(f"{time.monotonic() - self._began:.2f} s: {event.text}")

    def _read(self, stream: IO[bytes], sink: Sink, host: str, error: bool) -> None:
        for line in stream:
            with self._lock:
                # a host must not block on a full pipe, so what nobody reads is read all the same
                if self._deaf is None:
                    try:
                        sink(host, error, line)
                    except OSError as failure:
                        self._deaf = failure

    def _drain(self) -> None:
        for reader in self._readers:
            reader.join()
        for process in self._processes:
            for stream in process.streams or ():
                stream.close()
