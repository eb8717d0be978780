"""A link of limited bandwidth: what a rank sends leaves through a thread that sleeps as long as the bytes would take.

Sleeping costs no CPU, so that overlap shows in seconds even where all ranks share a core.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from heteromesh.comm.exchange import Addressed, Exchange


class _Sent:
    def __init__(self) -> None:
        self._done = threading.Event()

    def finish(self) -> None:
        self._done.set()

    def wait(self) -> None:
        assert self._done.wait(150), "the slow link did not send in time"


@contextmanager
def slow_link(bytes_per_second: float) -> Iterator[None]:
    """Within the block every exchange of this process sends at most so fast."""
    outbox: queue.Queue[tuple[dist.P2POp, _Sent] | None] = queue.Queue()

    def deliver() -> None:
        while (entry := outbox.get()) is not None:
            operation, sent = entry
            time.sleep(operation.tensor.nbytes / bytes_per_second)
            dist.isend(operation.tensor, operation.peer, operation.group).wait()
            sent.finish()

    def post(exchange: Exchange, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> list[Any]:
        group, works = exchange._world.exchange, list[Any]()
        works += [dist.irecv(t, exchange.ranks[i], group) for i, t in receives if t.numel()]
        for i, tensor in sends:
            if tensor.numel():
                works.append(_Sent())
                outbox.put((dist.P2POp(dist.isend, tensor, exchange.ranks[i], group), works[-1]))
        return works

    thread, original = threading.Thread(target=deliver, daemon=True), Exchange._post
    thread.start()
    Exchange._post = post  # type: ignore[assignment]
    try:
        yield
    finally:
        Exchange._post = original  # type: ignore[method-assign]
        outbox.put(None)
        thread.join()
