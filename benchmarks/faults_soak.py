"""Many seeded kills and stops, or a time of churn, with every result checked.

    python benchmarks/faults_soak.py --count 100 [--processes 4] [--collectives] [--kinds kill,stop] [--seed 0]
    python benchmarks/faults_soak.py --count 100 --lose coordinator,first    # these too, one fault in three
    python benchmarks/faults_soak.py --churn 300

A fault is followed by a join; the next fault comes up to 0.1 s after the job is whole again. In churn a kill or a join
comes every 0.5 to 2 s, whether the job is whole or not. Prints one line. Exit code 1 when a sum was wrong, commits
disagreed or a survivor hung.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from functools import partial

from heteromesh.faults.testing import inject
from heteromesh.faults.testing.lab import Lab, LabWork, Worker
from heteromesh.faults.wire.deadlines import Timing


def main() -> int:
    options = _options()
    multiprocessing.get_context("forkserver").set_forkserver_preload([Lab.__module__])
    work = LabWork(bytes=int(options.megabytes * (1 << 20)), collectives=options.collectives)
    with Lab(work, size=options.processes, timing=Timing(silence=options.silence), elective=bool(options.lose)) as lab:
        what = _churn(lab, options) if options.churn else _faults(lab, options)
        faults, stall, commits = lab.history().faults(), lab.history().longest_stall(), len(lab.history().events)
        kind = "every collective" if options.collectives else "out of place"
        print(
            f"{options.processes} processes, {kind}, {options.megabytes:g} MB, seed {options.seed}: {what}; "
            f"commits seen {commits}, longest stall {stall * 1e3:.0f} ms, "
            f"false evictions {lab.evicted}, wrong {len(faults)}, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults or "HANG" in what else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--churn", type=float, default=0.0, help="seconds of churn instead of single faults")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--megabytes", type=float, default=0.25)
    parser.add_argument("--collectives", action="store_true", help="every collective in each step, in-place sums too")
    parser.add_argument("--kinds", default="kill,kill,kill,kill,stop")
    parser.add_argument(
        "--lose", default="", help="coordinator and first (rank 0): one fault in three hits one of them"
    )
    parser.add_argument("--silence", type=float, default=0.8, help="deadline on signs of life, seconds")
    parser.add_argument("--seconds", type=float, default=280.0, help="ends early after so long")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _faults(lab: Lab, options: argparse.Namespace) -> str:
    """How many faults of each kind the job survived, and how fast it went on after kills."""
    took: list[float] = []
    done = {"kill": 0, "stop": 0}
    special = {name: 0 for name in options.lose.split(",") if name}
    dice = random.Random(options.seed + 1)
    until = time.monotonic() + options.seconds
    kinds = options.kinds.split(",")
    for fault in inject.schedule(options.seed, options.count, kinds=kinds, slots=options.processes):
        if time.monotonic() > until:
            break
        lab.pump(fault.delay)
        victim = lab.workers[fault.slot % len(lab.workers)]
        if special and dice.random() < 1 / 3:
            name = dice.choice(list(special))
            special[name] += 1
            if name == "coordinator" and lab.elected is None:
                if lab.interruption(inject.kill(lab.coordinator)) is None:
                    return f"HANG after the coordinator was lost, and {done}: {lab.describe()}"
                continue
            victim = (lab.elected if name == "coordinator" else lab.first) or victim
        act = inject.kill if fault.kind == "kill" else inject.stop
        seconds = lab.recovery(victim, act(victim.process.pid))
        if seconds is None:
            return f"HANG after {done}: {lab.describe()}"
        if fault.kind == "kill":
            took.append(seconds * 1e3)
        else:
            inject.resume(victim.process.pid)
            if not lab.until(partial(_fenced, victim), 10.0):
                return f"HANG of a resumed process after {done}: {victim.ended}"
        done[fault.kind] += 1
        lab.add(victim.slot)
        lab.settle(60.0)
    middle = f"{statistics.median(took):.0f} (longest {max(took):.0f}) ms after a kill" if took else ""
    of_these = "".join(f", {count} of them of the {name}" for name, count in special.items())
    return f"{done['kill']} kills, {done['stop']} stops{of_these}, {middle}"


def _fenced(worker: Worker) -> bool:
    return worker.ended.startswith("Fenced")


def _churn(lab: Lab, options: argparse.Namespace) -> str:
    dice = random.Random(options.seed)
    until = time.monotonic() + options.churn
    kills = joins = 0
    slots = range(options.processes)
    while time.monotonic() < until:
        lab.pump(dice.uniform(0.5, 2.0))
        free = sorted(set(slots) - {worker.slot for worker in lab.workers})
        if free and (len(lab.workers) <= 2 or dice.random() < 0.5):
            lab.add(dice.choice(free))
            joins += 1
        else:
            victim = dice.choice(lab.workers)
            inject.kill(victim.process.pid)
            lab.workers.remove(victim)
            lab.retired.append(victim)
            kills += 1
    lab.settle(60.0)
    return f"churn of {options.churn:g} s, {kills} kills, {joins} joins"


if __name__ == "__main__":
    sys.exit(main())
