"""Many short training jobs through random faults at random moments: what is lost, doubled or different at the end.

    python benchmarks/fault_storm.py [--jobs 200] [--seed 0] [--keep FOLDER]

Every job has two to four ranks, a tiny Llama, checkpoints every three steps, and faults drawn from its seed: one,
several or all ranks are killed (SIGKILL) or stopped (SIGSTOP, for up to 2.5 s) at any time, while a checkpoint is
written, when a rank has just joined, and at the last steps. Who ends with exit code 1 or a signal is started again, as
the agent of `heteromesh run --fault-tolerance` does. Checked at the end of each job: it is done; every sequence of
every step was trained once; no line is missing or there twice; every checkpoint has the digests it was written with,
and there was always one since the first; all members that reached the end have the same bits, and the losses of a run
without faults.
Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import heteromesh as hm
from heteromesh.comm.tcp.state_transfer import digest_of
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.diagnosis.monitor import Monitor
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.runtime.process.environment import environment_of
from heteromesh.runtime.process.failure import RESTARTS, PeerLost
from heteromesh.runtime.records.checkpoint_files import damage
from heteromesh.runtime.work.sampler import Sampler

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from llama import Llama, LlamaConfig

STEPS, EVERY, BATCH_TOKENS, PAUSE = 14, 3, 220, 0.05
"""Of a job: steps, steps between checkpoints, tokens of a step, seconds that each step takes longer than it must."""
RESTARTS_OF_A_RANK = 12
LIMIT_SECONDS = 150.0
COST = """\
seconds_per_token2 = 1e-8
seconds_per_token = 1e-5
seconds_per_pass = 1e-4
bytes_per_token = 4096
tokens_per_device = 100000
[bytes_per_second]
2 = 1e9
"""


def data() -> list[torch.Tensor]:
    source = random.Random(1)
    return [torch.tensor([source.randrange(61) for _ in range(2 + (i * 37) % 90)]) for i in range(60)]


def trainer_of(folder: Path, **changes: Any) -> hm.Trainer:
    torch.manual_seed(7)
    model = Llama(LlamaConfig(vocab=61, layers=1, hidden=32, heads=4, kv_heads=2, intermediate=48))
    config = hm.TrainerConfig(
        batch_tokens=BATCH_TOKENS,
        max_steps=STEPS,
        run_dir=folder / "run",
        learning_rate=3e-3,
        checkpoint_every=EVERY,
        cost=folder / "cost.toml",
        **changes,
    )
    return hm.Trainer(model, None, data(), config)


class Slow(hm.Hook):
    """Makes steps long enough for faults to fall into them."""

    def step_committed(self, step: hm.StepCommitted) -> None:
        del step
        time.sleep(PAUSE)


def member(environment: dict[str, str], folder: Path, shard: bool) -> None:
    """One rank: leaves the digest of its parameters when it reaches the end."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        trainer = trainer_of(folder, fault_tolerance=True, shard_optimizer=shard)
        trainer.hooks = (Slow(),)
        report = trainer.fit()
    except (UserError, PeerLost) as error:
        print(f"{environment['HETEROMESH_MEMBER_NAME']} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(error, UserError) else 1)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    told = {"digest": digest_of(list(trainer.model.parameters())), "losses": report.losses}
    (folder / f"end-{os.getpid()}").write_text(json.dumps(told))
    os._exit(0)


class Job:
    """One job: its coordinator here, its ranks as processes that are started again."""

    def __init__(self, folder: Path, ranks: int, shard: bool) -> None:
        self.folder, self.shard = folder, shard
        timing = Timing(gather=1.0, silence=1.0, stuck=30.0)
        bounds, quiet = Bounds(min=1, max=ranks), Monitor(say=lambda _: None)
        self.coordinator = Coordinator(b"s" * 32, bounds=bounds, timing=timing, monitor=quiet).start()
        self.context = multiprocessing.get_context("forkserver")
        self.processes: dict[int, Any] = {}
        self.starts = Counter[int]()
        self.due = dict.fromkeys(range(ranks), 0.0)
        self.stopped: list[tuple[int, float]] = []
        self.refused: list[int] = []
        self.done = False

    def turn(self) -> bool:
        """Starts who is due, collects who has ended; returns whether anybody is left."""
        now = time.monotonic()
        for rank, when in list(self.due.items()):
            if when <= now:
                del self.due[rank]
                self._start(rank)
        for rank, process in list(self.processes.items()):
            if process.exitcode is not None:
                process.join()
                del self.processes[rank]
                self._ended(rank, process.exitcode, now)
        for pid, until in list(self.stopped):
            if now >= until:
                self.stopped.remove((pid, until))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        return bool(self.processes or self.due)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        self.coordinator.stop()

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if rank in self.processes:
                os.kill(self.processes[rank].pid, signal.SIGKILL)

    def stop(self, ranks: list[int], seconds: float) -> None:
        for rank in ranks:
            if rank in self.processes:
                os.kill(self.processes[rank].pid, signal.SIGSTOP)
                self.stopped.append((self.processes[rank].pid, time.monotonic() + seconds))

    def _start(self, rank: int) -> None:
        environment = environment_of(
            coordinators=[self.coordinator.address],
            secret="s" * 32,
            name=f"host:{rank}",
            hosts=["127.0.0.1"],
            bounds=self.coordinator.membership.bounds,
            place=rank,
        )
        environment[RESTARTS] = str(self.starts[rank])
        self.starts[rank] += 1
        self.processes[rank] = self.context.Process(target=member, args=(environment, self.folder, self.shard))
        self.processes[rank].start()

    def _ended(self, rank: int, code: int, now: float) -> None:
        if code == 0:
            self.done = True
            self.due.clear()
        elif code == 2:
            self.refused.append(rank)
        elif not self.done and self.starts[rank] <= RESTARTS_OF_A_RANK:
            self.due[rank] = now + 0.1


def moments(job: Job) -> dict[str, Callable[[], bool]]:
    """Returns what a fault may wait for, by name."""
    run = job.folder / "run"
    joined = job.coordinator.membership.counts["joined"]

    def lines() -> int:
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    now, began = lines(), time.monotonic()
    return {
        "soon": lambda: time.monotonic() > began + 0.3,
        "next step": lambda: lines() > now,
        "save": lambda: any((run / "checkpoints").glob("*.part")),
        "join": lambda: job.coordinator.membership.counts["joined"] > joined,
        "end": lambda: lines() >= STEPS - 1,
        "finished": lambda: (run / "finished.json").exists(),
    }


def strike(job: Job, source: random.Random, told: Counter[str]) -> None:
    """Delivers one fault."""
    ranks = sorted(job.processes)
    if not ranks:
        return
    some = source.sample(ranks, source.choice([1, 1, 1, max(1, len(ranks) - 1), len(ranks)]))
    what = source.choice(["kill", "kill", "stop"])
    if what == "kill":
        job.kill(some)
    else:
        job.stop(some, source.uniform(0.1, 2.5))
    told[f"{what} {'all' if len(some) == len(ranks) else len(some)}"] += 1


def storm(folder: Path, seed: int, told: Counter[str]) -> str:
    """Runs one job; returns what is wrong with it, empty: nothing."""
    source = random.Random(seed)
    job = Job(folder, source.choice([2, 3, 3, 4]), source.random() < 0.3)
    faults, held, always = source.randint(1, 5), False, ""
    limit = time.monotonic() + LIMIT_SECONDS
    try:
        waits = moments(job)
        moment = source.choice(list(waits))
        while job.turn():
            if time.monotonic() > limit:
                return "it hangs"
            whole = list((folder / "run/checkpoints").glob("step-*[0-9]"))
            held = held or bool(whole)
            if held and not whole:
                always = "a checkpoint was lost"
            ready = waits[moment]()
            if faults and ready:
                told[f"at {moment}"] += 1
                strike(job, source, told)
                faults -= 1
                waits, moment = moments(job), source.choice(["soon", "next step", "next step", "save", "join", "end"])
            time.sleep(0.002)
        return always or verdict(job)
    finally:
        job.close()


def verdict(job: Job) -> str:
    """Returns what is wrong at the end."""
    if job.refused:
        return f"ranks {job.refused} were refused"
    if not job.done:
        return "the job was lost"
    for name in ("metrics.jsonl", "plan.jsonl", "ledger.jsonl"):
        if [row["step"] for row in rows(job.folder / "run" / name)] != list(range(1, STEPS + 1)):
            return f"{name} has other steps"
    sampler = Sampler([len(s) for s in data()], batch_tokens=BATCH_TOKENS, seed=0)
    for row in rows(job.folder / "run/ledger.jsonl"):
        trained = sorted(place for places in row["trained"].values() for place in places)
        if trained != list(range(len(sampler.next_batch().lengths))):
            return f"step {row['step']} trained {trained}"
    for path in (job.folder / "run/checkpoints").iterdir():
        if path.suffix != ".part" and damage(path):
            return f"{path.name}: {damage(path)}"
    if not (job.folder / f"run/checkpoints/step-{STEPS:08d}").exists():
        return "there is no checkpoint of the last step"
    ends = [json.loads(path.read_text()) for path in job.folder.glob("end-*")]
    if len({end["digest"] for end in ends}) > 1:
        return "members have different bits"
    losses = [row["loss"] for row in rows(job.folder / "run/metrics.jsonl")]
    off = max(abs(ours - theirs) for ours, theirs in zip(losses, reference(job.folder.parent), strict=True))
    return f"losses differ by {off:.2g}" if off > 1e-3 else ""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reference(folder: Path) -> list[float]:
    """Returns the losses of one process that knows nothing of faults; computed once."""
    if not (folder / "run").exists():
        trainer_of(folder).fit()
    return [row["loss"] for row in rows(folder / "run/metrics.jsonl")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first job; the others follow")
    parser.add_argument("--keep", type=Path, help="where to keep the folders of jobs with which something is wrong")
    chosen = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["heteromesh.runtime.training.elastic"])
    told, wrong, began = Counter[str](), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "cost.toml").write_text(COST)
        reference(base)
        for seed in range(chosen.seed, chosen.seed + chosen.jobs):
            folder = base / str(seed)
            folder.mkdir()
            (folder / "cost.toml").write_text(COST)
            problem = storm(folder, seed, told)
            if problem:
                wrong[problem.split(" ", 1)[0] if problem.startswith("step") else problem] += 1
                print(f"job {seed}: {problem}", flush=True)
                if chosen.keep:
                    shutil.copytree(folder, chosen.keep / str(seed), dirs_exist_ok=True)
            shutil.rmtree(folder)
            done = seed - chosen.seed + 1
            print(f"{done} jobs, {sum(wrong.values())} wrong, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{chosen.jobs} jobs of seeds from {chosen.seed}: {dict(wrong) or 'nothing wrong'}; faults {dict(told)}")


if __name__ == "__main__":
    main()
