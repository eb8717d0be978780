"""What depends on the pass: a value that holds within a block, also for what autograd computes again on other threads,
and functions that look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def never_compiled(function: F) -> F:
    """Returns the function as one that torch.compile leaves out of its graphs: what it does depends on the pass."""
    left_out: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call,unused-ignore]
    return left_out


class Scope(Generic[T]):
    """What a pass makes known to the functions that its model calls.

    A thread has its own value. Backward runs on other threads (one of autograd's a device), where layers may be
    computed again: these have the value of the block that their backward began in, found by autograd's number for it.
    """

    def __init__(self, name: str) -> None:
        self._value: ContextVar[T | None] = ContextVar(name, default=None)
        self._backwards: dict[int, T] = {}

    def get(self) -> T | None:
        """Returns the value that holds here, if any."""
        value = self._value.get()
        if value is None and self._backwards:
            return self._backwards.get(backward_number())
        return value

    @contextmanager
    def holding(self, value: T) -> Iterator[None]:
        """Makes the value hold on this thread within the block."""
        token = self._value.set(value)
        try:
            yield
        finally:
            self._value.reset(token)

    @contextmanager
    def backward_of(self, root: torch.Tensor) -> Iterator[None]:
        """Makes this thread's value hold in backwards from `root` within the block, on whatever thread."""
        value, numbers = self._value.get(), set[int]()

        def note(_: torch.Tensor) -> None:
            if value is not None:
                numbers.add(number := backward_number())
                self._backwards[number] = value

        hook = root.register_hook(note)
        try:
            yield
        finally:
            hook.remove()
            for number in numbers:
                self._backwards.pop(number, None)


def backward_number() -> int:
    """Returns autograd's number of the backward that this thread is in; -1: in none."""
    number: int = torch._C._current_graph_task_id()
    return number
