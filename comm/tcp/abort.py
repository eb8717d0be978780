"""Abort as a state: once set, whatever blocks now or later on the group raises at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class GroupAborted(RuntimeError):
    """The group's transport is gone; nothing that was under way may be used.

    `peer` is the rank whose connection failed, when that was the cause; None when the abort was asked for. `disagreed`:
    it sent something else than this rank expects, so both are well and would do the same again.
    """

    def __init__(self, reason: str, *, peer: int | None = None, disagreed: bool = False) -> None:
        super().__init__(reason)
        self.peer, self.disagreed = peer, disagreed


class Abort:
    """A switch that only goes one way and that `poll` and `epoll` can wait for.

    It may be set before the connections exist: an event delivered once would miss the sockets opened after it
    (research/fault-tolerance.md, section 7, bug b).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: list[Callable[[], None]] = []
        self.error: GroupAborted | None = None

    def fileno(self) -> int:
        """Returns a descriptor that is readable from the moment the state is set (it is never drained)."""
        return self._fd

    def set(self, error: GroupAborted) -> bool:
        """Aborts, from any thread; returns False when it was aborted already (the first reason stays)."""
        with self._lock:
            if self.error is not None:
                return False
            self.error = error
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)
            calls = list(self._calls)
        for call in calls:
            call()
        return True

    def check(self) -> None:
        """Raises GroupAborted when the state is set. A fresh exception each time: tracebacks must not pile up."""
        if self.error is not None:
            raise GroupAborted(str(self.error), peer=self.error.peer, disagreed=self.error.disagreed)

    def on_set(self, call: Callable[[], None]) -> None:
        """Calls this in the aborting thread when the state is set; at once when it is."""
        with self._lock:
            self._calls.append(call)
            late = self.error is not None
        if late:
            call()

    def close(self) -> None:
        """Frees the descriptor; the state stays readable."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
            self._calls.clear()
