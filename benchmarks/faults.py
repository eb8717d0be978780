"""Faults in all-reduces: how long until every survivor has the next committed sum, and whether any sum was wrong.

    python benchmarks/faults.py [--kills 100] [--processes 4] [--megabytes 1 64] [--parts kill,stop] [--peer torchft]

Our side runs checked steps (faults/testing/lab.py): a sum counts when all survivors have committed it. Plain gloo runs
the same all-reduce in a loop; a survivor counts as done when its all-reduce has ended, which is an error after the
group's time limit. Prints Markdown. Exit code 1 when a sum was wrong, a commit disagreed or a survivor hung.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.testing import inject
from heteromesh.faults.testing.lab import Lab, LabWork, Worker
from heteromesh.faults.wire.deadlines import Timing

_GLOO_LIMIT = 5.0
_SECRET = b"benchmark"
_context = multiprocessing.get_context("forkserver")


def main() -> int:
    options = _options()
    _context.set_forkserver_preload(["heteromesh.faults.testing.lab", "torch.distributed"])
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at start, torch {torch.__version__}\n")
    wrong: list[str] = []
    parts = options.parts.split(",")
    if "healthy" in parts:
        _healthy(options)
    if "kill" in parts:
        print("| processes | MB | kills | step, ms | SIGKILL to all survivors committed, ms: median / p90 / max |")
        print("|---|---|---|---|---|")
        for megabytes in options.megabytes:
            wrong += _kills(options, megabytes, options.kills, 0)
    if "ballast" in parts:
        print(f"\nVictims with {options.ballast} GB resident:\n")
        wrong += _kills(options, options.megabytes[0], 3, options.ballast << 30)
    if "stop" in parts:
        wrong += _stops(options)
    if "coordinator" in parts:
        wrong += _coordinators(options)
    if "gloo" in parts:
        _gloo(options)
    if options.peer:
        _torchft(options)
    for fault in wrong:
        print(f"FAULT: {fault}")
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="for each size (default 100)")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=10, help="of the coordinator part, each with a job of its own")
    parser.add_argument("--ballast", type=int, default=4, help="GB resident in the victims of the ballast part")
    parser.add_argument(
        "--silence", type=float, default=0.4, help="deadline on signs of life in the stop part, seconds"
    )
    parser.add_argument("--collectives", action="store_true", help="every collective in each step, not the sum alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="healthy,kill,ballast,stop,coordinator,gloo")
    parser.add_argument("--peer", choices=["torchft"], help="5 kills of this one too, where it is installed")
    return parser.parse_args()


def _kills(options: argparse.Namespace, megabytes: float, count: int, ballast: int) -> list[str]:
    work = LabWork(bytes=int(megabytes * (1 << 20)), collectives=options.collectives)
    size = options.processes
    with Lab(work, size=size, timing=Timing(silence=2.0)) as lab:
        lab.pump(1.0)
        step = _step_seconds(lab)
        took = []
        for fault in inject.schedule(options.seed, count, slots=size):
            if ballast:
                lab.retire(lab.workers[fault.slot])
                lab.add(fault.slot, ballast=ballast)
                lab.settle(120.0)
                lab.pump(0.5)
            lab.pump(fault.delay)
            victim = next(w for w in lab.workers if w.slot == fault.slot) if ballast else lab.workers[fault.slot]
            seconds = lab.recovery(victim, inject.kill(victim.process.pid))
            if seconds is None:
                return [f"a survivor hung after a kill: {lab.describe()}"]
            took.append(seconds * 1e3)
            lab.add(victim.slot)
            lab.settle()
        faults = lab.history().faults()
        stall = lab.history().longest_stall()
    print(f"| {size} | {megabytes:g} | {count} | {step * 1e3:.1f} | {_spread(took)} |", flush=True)
    print(
        f"\nLongest stall with joins: {stall * 1e3:.0f} ms; wrong or disagreeing commits: {len(faults)}\n", flush=True
    )
    return faults


def _step_seconds(lab: Lab) -> float:
    times = [event.time for event in lab.workers[0].events]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.0f} / {ordered[int(0.9 * (len(ordered) - 1))]:.0f} / {ordered[-1]:.0f}"


def _stops(options: argparse.Namespace) -> list[str]:
    took, fenced = [], 0
    with Lab(LabWork(), size=options.processes, timing=Timing(silence=options.silence)) as lab:
        for fault in inject.schedule(options.seed, 5, kinds=("stop",), slots=options.processes):
            lab.pump(0.5 + fault.delay)
            victim = lab.workers[fault.slot]
            seconds = lab.recovery(victim, inject.stop(victim.process.pid))
            if seconds is None:
                return [f"a survivor hung after a stop: {lab.describe()}"]
            took.append(seconds * 1e3)
            inject.resume(victim.process.pid)
            fenced += lab.until(partial(_is_fenced, victim), 5.0)
            lab.add(victim.slot)
            lab.settle()
        faults = lab.history().faults()
    print(f"\nSIGSTOP, deadline {options.silence * 1e3:.0f} ms: {_spread(took)} ms; {fenced} of 5 resumed were fenced")
    return faults


def _coordinators(options: argparse.Namespace) -> list[str]:
    """The coordinator's process is lost in the middle of steps, its host lives; the members elect another."""
    print("\n| coordinator | rounds | to all members committed under another, ms: median / p90 / max |\n|---|---|---|")
    wrong: list[str] = []
    for what, act in (("SIGKILL", inject.kill), ("SIGSTOP", inject.stop)):
        took = []
        for index in range(options.rounds):
            with Lab(LabWork(), size=options.processes, elective=True) as lab:
                lab.pump(0.5 + 0.01 * index)
                seconds = lab.interruption(act(lab.coordinator))
                if seconds is None:
                    return [*wrong, f"members hung after {what} of the coordinator: {lab.describe()}"]
                took.append(seconds * 1e3)
                if act is inject.stop:
                    inject.resume(lab.coordinator)
                lab.pump(0.5)
                wrong += lab.history().faults() + [w.ended for w in lab.workers if w.ended]
        print(f"| {what} | {options.rounds} | {_spread(took)} |", flush=True)
    return wrong


def _is_fenced(worker: Worker) -> bool:
    return worker.ended.startswith("Fenced")


def _torchft(options: argparse.Namespace) -> None:
    import faults_torchft as peer

    reason = peer.missing()
    if reason:
        print(f"\n{reason}")
        return
    for megabytes in options.megabytes:
        took = peer.kills(options.processes, megabytes, 5, options.seed)
        times = " / ".join("over 60000" if s is None else f"{s * 1e3:.0f}" for s in took)
        print(f"\ntorchft, {options.processes} processes, {megabytes:g} MB, each of 5 kills: {times} ms", flush=True)


def _healthy(options: argparse.Namespace) -> None:
    print("All-reduce of 16 MB without faults, alternating in the same processes:\n")
    server = Coordinator(_SECRET, bounds=Bounds(min=options.processes)).start()
    ours, committed, gloo = _ranks(options.processes, _healthy_rank, server.address)[0]
    server.stop()
    print(
        f"gloo {gloo * 1e3:.1f} ms; ours, checksums on, {ours * 1e3:.1f} ms (ratio {ours / gloo:.2f}); "
        f"ours to the commit {committed * 1e3:.1f} ms (ratio {committed / gloo:.2f})\n",
        flush=True,
    )


def _healthy_rank(rank: int, size: int, address: tuple[str, int]) -> tuple[float, float, float]:
    member = Member(JoinOptions(coordinators=[address], secret=_SECRET, name=str(rank)))
    group = member.group()
    steps = Steps(group)
    steps.start()
    source = torch.full((4 << 20,), float(rank))
    target = torch.empty_like(source)
    ours, committed, gloo = [], [], []
    for _ in range(40):
        dist.barrier()
        start = time.perf_counter()
        group.all_reduce(source, target)
        ours.append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()
        steps.reduce([source])
        committed.append(time.perf_counter() - start)
        target.copy_(source)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(target)
        gloo.append(time.perf_counter() - start)
    dist.barrier()
    member.close()
    return statistics.median(ours[5:]), statistics.median(committed[5:]), statistics.median(gloo[5:])


def _gloo(options: argparse.Namespace) -> None:
    seconds = _ranks(options.processes, _gloo_rank, None, lost=1)
    worst = max(s for s in seconds if s is not None)
    print(
        f"\nPlain gloo, 1 MB, time limit {_GLOO_LIMIT:g} s: SIGKILL to the last survivor's error {worst * 1e3:.0f} ms"
    )


def _gloo_rank(rank: int, size: int, _: None) -> float:
    values = torch.ones(1 << 18)
    died = torch.zeros(1, dtype=torch.float64)
    for step in range(50):
        if rank == 1 and step == 20:
            os.kill(os.getpid(), 9)
        died[0] = time.monotonic()
        try:
            dist.all_reduce(values)
        except RuntimeError:
            break
    return time.monotonic() - float(died)


def _ranks(size: int, act: Any, argument: Any, *, lost: int = 0) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _context.Process(target=_rank, args=(r, size, folder, pipes[r][1], act, argument)) for r in range(size)
        ]
        for process, (_, sink) in zip(processes, pipes, strict=True):
            process.start()
            sink.close()
        results = []
        for source, _ in pipes:
            try:
                results.append(source.recv())
            except EOFError:
                results.append(None)
        for process in processes:
            process.kill()
            process.join()
    if results.count(None) > lost:
        raise RuntimeError(f"{results.count(None)} ranks of the comparison failed")
    return results


def _rank(rank: int, size: int, folder: str, sink: Connection, act: Any, argument: Any) -> None:
    torch.set_num_threads(1)
    store = torch._C._distributed_c10d.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_GLOO_LIMIT))
    sink.send(act(rank, size, argument))
    time.sleep(600)  # until it is killed: a rank that ends would tell the others of the failure


if __name__ == "__main__":
    sys.exit(main())
