"""torchft's recovery from a SIGKILL, for benchmarks/faults.py --peer torchft; the only file that imports torchft.

One replica group of one process each, its default lighthouse and heartbeats, Gloo underneath: an all-reduce, a commit,
again. A kill comes at a random moment of a job of its own, and counts until every survivor has committed a step whose
participants are the survivors.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

_TIMEOUT = timedelta(seconds=15)


def missing() -> str:
    """A sentence when torchft cannot be imported; empty when it can."""
    try:
        import torchft  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return f"torchft is left out: {error}"
    return ""


def kills(processes: int, megabytes: float, count: int, seed: int) -> list[float | None]:
    """Seconds from each kill to the last survivor's commit; None when that took more than 60 s."""
    dice = random.Random(seed)
    return [_kill(processes, megabytes, dice.randrange(processes), dice.uniform(1.0, 1.2)) for _ in range(count)]


def _kill(processes: int, megabytes: float, victim: int, delay: float) -> float | None:
    from torchft.coordination import LighthouseServer  # type: ignore[import-not-found]

    context = multiprocessing.get_context("spawn")
    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=2)
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        context.Process(target=_work, args=(i, server.address(), int(megabytes * (1 << 18)), pipes[i][1]), daemon=True)
        for i in range(processes)
    ]
    try:
        for worker, (_, sink) in zip(workers, pipes, strict=True):
            worker.start()
            sink.close()
        sources = {source: i for i, (source, _) in enumerate(pipes)}
        _collect(sources, set(range(processes)), 0.0, processes, 90.0)
        _collect(sources, set(), 0.0, processes, delay)
        killed = time.monotonic()
        workers[victim].kill()
        return _collect(sources, set(range(processes)) - {victim}, killed, processes - 1, 60.0, killed)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        server.shutdown()


def _collect(
    sources: dict[Any, int], wanted: set[int], since: float, participants: int, seconds: float, zero: float = 0.0
) -> float | None:
    """Reads commits for so long, or until all of `wanted` have made one of that many participants after `since`."""
    until, last = time.monotonic() + seconds, 0.0
    missing = set(wanted)
    while (left := until - time.monotonic()) > 0 and (missing or not wanted):
        for source in wait(list(sources), left):
            try:
                moment, count, right = cast(Connection, source).recv()
            except EOFError:
                del sources[source]
                continue
            if not right:
                raise RuntimeError("torchft committed a wrong sum")
            if moment > since and count == participants and sources[source] in missing:
                missing.discard(sources[source])
                last = max(last, moment)
    return None if missing else last - zero


def _work(index: int, lighthouse: str, count: int, sink: Connection) -> None:
    from torchft.manager import Manager  # type: ignore[import-not-found]
    from torchft.process_group import ProcessGroupGloo  # type: ignore[import-not-found]

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    store = torch._C._distributed_c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=_TIMEOUT),
        load_state_dict=lambda state: None,
        state_dict=dict,
        min_replica_size=2,
        use_async_quorum=False,
        timeout=_TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica{index}",
        hostname="127.0.0.1",
    )
    values = torch.ones(count)
    while True:
        values.fill_(1.0)
        manager.start_quorum()
        manager.allreduce(values).wait()
        if manager.should_commit():
            # torchft divides the sum by the number of participants
            sink.send((time.monotonic(), manager.num_participants(), bool((values == 1).all())))
