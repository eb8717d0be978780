"""Runs a function on several gloo ranks: fresh processes forked from a server that has imported torch already."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forks import context
from heteromesh.comm.world import World, join_world

LIMIT = 150.0
"""Seconds: what never ends is told before pytest's own limit; a busy machine is no failure."""


def run_ranks(size: int, act: Callable[..., Any], *args: Any, seconds: float = LIMIT) -> list[Any]:
    """act(world, *args) on every rank of a world of this size; the results in rank order.

    `act` is a function of a test module. The first rank's exception is raised here as AssertionError; ranks that are
    not done after `seconds` are killed and named.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run_processes(size, _in_world, size, Path(folder), act, args, seconds=seconds)


def run_processes(size: int, act: Callable[..., Any], *args: Any, seconds: float = LIMIT) -> list[Any]:
    """act(index, *args) in so many processes that know nothing of each other; else as `run_ranks`."""
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [context.Process(target=_main, args=(rank, pipes[rank][1], act, args)) for rank in range(size)]
    for process, (_, sink) in zip(processes, pipes, strict=True):
        process.start()
        sink.close()
    try:
        return _collect(processes, [source for source, _ in pipes], time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list[Any], sources: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(processes):
        if time.monotonic() > deadline:
            missing = [r for r in range(len(processes)) if r not in results and r not in failures]
            raise AssertionError(f"ranks {missing} were not done in time; failures so far: {failures}")
        if failures and time.monotonic() > deadline - 1:
            break
        for rank, source in enumerate(sources):
            if rank in results or rank in failures or not source.poll(0.01):
                continue
            try:
                fine, value = source.recv()
            except EOFError:
                processes[rank].join(5)  # its end of the pipe closes before its exit code is known
                fine, value = False, f"rank {rank} died with exit code {processes[rank].exitcode}"
            (results if fine else failures)[rank] = value
        if failures:
            # peers of a failed rank may hang: give them a moment to report, then go
            deadline = min(deadline, time.monotonic() + 3)
    if failures:
        raise AssertionError("\n".join(failures[rank] for rank in sorted(failures)))
    return [results[rank] for rank in range(len(processes))]


def _main(rank: int, sink: Any, act: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        sink.send((True, act(rank, *args)))
    except BaseException:
        sink.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _in_world(rank: int, size: int, folder: Path, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
    with join_world(timedelta(seconds=LIMIT)) as world:
        return act(world, *args)


__all__ = ["World", "run_processes", "run_ranks"]
