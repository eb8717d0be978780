"""Pending operations, and what the collectives need of a network: messages between two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Work(Protocol):
    """An operation under way: a message, an exchange or a collective. Its tensors must not be touched meanwhile."""

    def wait(self) -> object:
        """Returns when the result is here and every buffer may be reused.

        May be called from any thread, and for several works in any order; blocks without the interpreter's lock. A
        message or an exchange is waited for at most once. Raises what went wrong (peer gone, time limit, and
        GroupAborted where the transport was aborted), at the latest after the transport's time limit.
        """


class OnceWork(Work):
    """A `Work` that a function finishes: called at the first wait; what it raises is raised by every wait."""

    def __init__(self, finish: Callable[[], object]) -> None:
        self._finish: Callable[[], object] | None = finish
        self._error: BaseException | None = None

    def wait(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            try:
                finish()
            except BaseException as error:
                self._error = error
        if self._error is not None:
            raise self._error


class Transport(Protocol):
    """Messages between the ranks 0..size-1 of one communicator. Safe to call from several threads.

    Between two ranks, the n-th send with a tag (comm/tags.py) meets the n-th receive with that tag; both ends agree on
    the size in bytes, which is never zero. Messages of different tags don't wait for each other: one that arrives
    before its receive is posted must not hold up those behind it (it is buffered, or not sent before the receive is
    posted). Tensors are contiguous, on the CPU, and stay alive and untouched until the work is done; the caller sees
    to that.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, peer: int, tensor: torch.Tensor, tag: int) -> Work:
        """Starts to send and returns at once; 0 <= tag < 2**16."""

    def recv(self, peer: int, tensor: torch.Tensor, tag: int) -> Work:
        """Posts a receive into this tensor and returns at once."""

    def close(self) -> None:
        """Ends the transport; works under way raise."""
