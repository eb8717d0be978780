"""A pass's forward in a thread of its own, which runs only while it has the baton.

The scheduler hands the baton over and waits until the pass calls a layer or ends: no two threads ever run at once, and
what a pass's model keeps on its stack (loops over layers, values between them) waits there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from heteromesh.parallel.layer_major.thread_state import Autocast, OwnGenerators

T = TypeVar("T")


class _Abandoned(BaseException):
    """Ends a pass that won't be gone on with."""


class _Told(NamedTuple):
    """What a thread hands back with the baton."""

    call: Any = None
    error: BaseException | None = None
    result: Any = None


class PassThread(threading.Thread, Generic[T]):
    """Runs `body` from one call of `resume` to the next."""

    def __init__(self, body: Callable[[], T], device: torch.device) -> None:
        """body: calls `wait` for what the scheduler is to do; it begins with this thread's context and autocast."""
        super().__init__(name="heteromesh-pass", daemon=True)
        self.generators = OwnGenerators(device)
        self.result: T | None = None
        """Of the body, when it has ended."""
        self.ended = False
        self._body, self._device = body, device
        self._context, self._autocast = copy_context(), Autocast.current(device)
        self._resumed: SimpleQueue[Any] = SimpleQueue()
        self._yielded: SimpleQueue[_Told] = SimpleQueue()

    def resume(self, answer: Any = None) -> Any:
        """Lets the body go on with the answer to what it waits for; returns what it waits for next, None: it has ended.

        Raises what the body raised.
        """
        with self.generators.active():
            if self.ident is None:
                self.start()
            else:
                self._resumed.put(answer)
            told = self._yielded.get()
        if told.call is not None:
            return told.call
        self.ended, self.result = True, told.result
        self.join()
        if told.error is not None:
            raise told.error
        return None

    def wait(self, call: Any) -> Any:
        """Hands the baton back, from within the body, and returns the answer to this call."""
        self._yielded.put(_Told(call=call))
        answer = self._resumed.get()
        if isinstance(answer, _Abandoned):
            raise answer
        return answer

    def abandon(self) -> None:
        """Ends the body wherever it is; contexts that it has entered are left."""
        if self.ident is None or self.ended:
            return
        with self.generators.active():
            self._resumed.put(_Abandoned())
            self._yielded.get()
        self.ended = True
        self.join()

    def run(self) -> None:
        """The thread's own."""
        try:
            result = self._context.run(self._enter)
        except BaseException as error:
            self._yielded.put(_Told(error=error))
        else:
            self._yielded.put(_Told(result=result))

    def _enter(self) -> T:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with self._autocast.active():
            return self._body()
