"""Ctrl-C and SIGTERM ask the training loop to stop after the step that runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

AGAIN_SECONDS = 2.0
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Lets `handler` have these signals inside of the block. For the main thread, the only one Python allows it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Interrupt:
    """While entered, remembers the signal instead of dying of it; a second Ctrl-C, seconds later, ends at once
    (under torchrun it is torchrun that ends its workers then).

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = 0.0
        self._handled = ExitStack()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._handled.enter_context(handled((signal.SIGINT, signal.SIGTERM), self._remember))
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # under torchrun a terminal's Ctrl-C arrives twice, the second time whenever a long kernel lets Python run again
        again = number == signal.SIGINT and self.signal is not None and UNDER_TORCHRUN not in os.environ
        if again and now - self._asked > AGAIN_SECONDS:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._asked = number, now
