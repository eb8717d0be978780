"""What the collectives need of a network: messages between two ranks, posted now and complete later."""

from __future__ import annotations

from typing import Protocol

import torch


class Work(Protocol):
    """A posted message."""

    def wait(self) -> object:
        """Returns when the message has arrived (receive) or its tensor may be reused (send).

        Called at most once, from any thread, in any order; blocks without the interpreter's lock. Raises what went
        wrong (peer gone, time limit, aborted), at the latest after the transport's time limit.
        """


class Transport(Protocol):
    """Messages between the ranks 0..size-1 of one communicator. Safe to call from several threads.

    Between two ranks, the n-th send with a tag meets the n-th receive with that tag; both ends agree on the size in
    bytes, which is never zero. Messages of different tags don't wait for each other: one that arrives before its
    receive is posted must not hold up those behind it (it is buffered, or not sent before the receive is posted).
    Tensors are contiguous, on the CPU, and stay alive and untouched until the work is done; the caller sees to that.
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
