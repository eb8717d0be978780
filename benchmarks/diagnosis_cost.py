"""What the records of operations take of an all-reduce of 1 MB between 4 processes: with and without in turn."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch

from heteromesh.comm.tcp.abort import Abort
from heteromesh.comm.tcp.collectives import all_reduce
from heteromesh.comm.tcp.connect import Place, build
from heteromesh.comm.tcp.listen import Listener
from heteromesh.comm.tcp.records import Records

_SIZE, _ROUNDS, _TURN = 4, 60, 25
_SECRET = b"cost"


class _Nothing(Records):
    """Keeps no records."""

    def enter(self, name: str) -> None: ...

    def exit(self) -> None: ...

    def waited(self, peer: int, incoming: bool, began: int, flow: int) -> None: ...

    def flow(self, peer: int, now: int) -> int:
        return 0


class _Counting(_Nothing):
    """Counts blocked waits."""

    waits = 0

    def waited(self, peer: int, incoming: bool, began: int, flow: int) -> None:
        self.waits += 1


def cost() -> None:
    """Prints one line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    pipes = [context.Pipe() for _ in range(_SIZE)]
    processes = [context.Process(target=_rank, args=(rank, pipes[rank][1])) for rank in range(_SIZE)]
    for process in processes:
        process.start()
    addresses = [pipe.recv() for pipe, _ in pipes]
    for pipe, _ in pipes:
        pipe.send(addresses)
    results = [pipe.recv() for pipe, _ in pipes]
    for process in processes:
        process.join()
    ratios = sorted(b / a for a, b in zip(*results[0][:2], strict=True))
    without = statistics.median(results[0][0])
    calls, waits = results[0][2:]
    print(
        f"\nAll-reduce of 1 MB, {_SIZE} processes, {_ROUNDS} turns of {_TURN} with and without records: without "
        f"{without * 1e3:.2f} ms (median turn); with / without {statistics.median(ratios):.4f} (median of neighbouring "
        f"turns; quartiles {ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}). The calls alone: "
        f"{calls * 1e6:.1f} us an all-reduce with its {waits:.1f} blocked waits, {calls / without:.2%} of it."
    )


def _rank(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    listener = Listener(_SECRET)
    pipe.send(listener.addresses)
    addresses = pipe.recv()
    transport = build(listener, Place(addresses=addresses, rank=rank, epoch=1), _SECRET, Abort())
    source = torch.ones(1 << 18)
    target = torch.empty_like(source)
    kinds = (_Nothing(_SIZE, {}), transport.records)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * _ROUNDS + 4):
        transport.records = kinds[turn % 2]
        start = time.perf_counter()
        for _ in range(_TURN):
            all_reduce(transport, source, target, checked=True)
        times[turn % 2].append((time.perf_counter() - start) / _TURN)
    counting = transport.records = _Counting(_SIZE, {})
    for _ in range(_TURN):
        all_reduce(transport, source, target, checked=True)
    # the others wait for rank 0 in the last sum, so that it has a core for itself
    calls = _calls(kinds[1], counting.waits / _TURN) if rank == 0 else 0.0
    all_reduce(transport, source, target)
    pipe.send((times[0][2:], times[1][2:], calls, counting.waits / _TURN))
    transport.close()
    listener.close()


def _calls(records: Records, waits: float, count: int = 5000) -> float:
    """Seconds of all that is called for a sum of 1 MB: an entry, an exit, the blocked waits, and for the two messages
    from each of 3 peers two clock readings and three counters."""
    cells, blocked = [0] * 8, [divmod(i, 3)[1] + 1 for i in range(round(waits * 100))]
    start = time.perf_counter()
    for peer in blocked:
        began = time.monotonic_ns()
        records.waited(peer, True, began, records.flow(peer, began))
    each = (time.perf_counter() - start) / 100
    start = time.perf_counter()
    for _ in range(count):
        records.enter("all_reduce")
        for _ in range(6):
            since = time.monotonic_ns()
            cells[0] += time.monotonic_ns() - since
            cells[1] += 1
            cells[2] += 1
        records.exit()
    return each + (time.perf_counter() - start) / count


if __name__ == "__main__":
    cost()
