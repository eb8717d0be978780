"""Ctrl-C and SIGTERM ask the training loop to stop after the step that runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

AGAIN_SECONDS = 2.0
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"


class Interrupt:
    """While entered, remembers the signal instead of dying of it; a second Ctrl-C, seconds later, ends at once
    (under torchrun it is torchrun that ends its workers then).

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # under torchrun a terminal's Ctrl-C arrives twice, the second time whenever a long kernel lets Python run again
        again = number == signal.SIGINT and self.signal is not None and UNDER_TORCHRUN not in os.environ
        if again and now - self._asked > AGAIN_SECONDS:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._asked = number, now
