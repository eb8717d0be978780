"""Training through random faults against the same training without any.

    python benchmarks/elastic_training.py [--faults 20] [--ranks 4] [--steps 150] [--seed 0]

Runs `heteromesh run --fault-tolerance` twice on this machine. In the second run ranks are killed (SIGKILL) or stopped
(SIGSTOP, continued seconds later: they find themselves fenced and end) at random moments; the agent starts them again.
Checked at the end: all members have the same bits, every sequence of every batch was trained once, no step is missing
or there twice, and the losses are those of the undisturbed run. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

import heteromesh as hm
from heteromesh.comm.tcp.state_transfer import digest_of
from heteromesh.runtime.work.sampler import Sampler

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from llama import Llama, LlamaConfig

BATCH_TOKENS = 6000
JOINED = "joined-"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def data() -> list[torch.Tensor]:
    """Random walks over 64 tokens: lognormal lengths, and something to learn."""
    source = random.Random(0)
    sequences = []
    for _ in range(600):
        token, tokens = source.randrange(64), []
        for _ in range(min(2000, max(20, int(source.lognormvariate(5.3, 1.0))))):
            token = (token + source.choice((1, 1, 1, 5, 11))) % 64
            tokens.append(token)
        sequences.append(torch.tensor(tokens))
    return sequences


def work(folder: Path, steps: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=64, layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128))
    config = hm.TrainerConfig(
        batch_tokens=BATCH_TOKENS, max_steps=steps, run_dir=folder, fault_tolerance=True, learning_rate=3e-3
    )
    trainer = hm.Trainer(model, None, data(), config)

    def joined(*_: object) -> None:
        if trainer.sampler.state_dict()["index"]:
            (folder.parent / f"{JOINED}{os.getpid()}").touch()

    model.layers[0].register_forward_pre_hook(joined)
    trainer.fit()
    print(f"digest {digest_of(list(model.parameters()))}", flush=True)


class Run:
    """A job of `heteromesh run --fault-tolerance`."""

    def __init__(self, folder: Path, chosen: argparse.Namespace) -> None:
        self.folder = folder
        folder.parent.mkdir()
        words = [sys.executable, "-m", "heteromesh", "run", "--fault-tolerance", "--max-restarts", str(chosen.faults)]
        words += ["--nproc-per-node", str(chosen.ranks), "--min-ranks", "2", __file__]
        words += ["--worker", str(folder), "--steps", str(chosen.steps)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def workers(self) -> list[int]:
        """Process ids of the ranks that have taken part in a step and live."""
        ids = [int(path.name.removeprefix(JOINED)) for path in self.folder.parent.glob(f"{JOINED}*")]
        return sorted(process for process in ids if Path(f"/proc/{process}/cwd").exists())

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def finish(self) -> tuple[list[str], float]:
        """(digest of every member at the end, seconds of all steps)."""
        out, error = self.process.communicate(timeout=900)
        if self.process.returncode:
            raise SystemExit(f"the run failed ({self.process.returncode}):\n{out[-2000:]}{error[-3000:]}")
        # lines of several processes may run into each other
        digests = re.findall(r"digest ([0-9a-f]{32})", out)
        return digests, sum(row["measured_seconds"] for row in rows(self.folder / "metrics.jsonl"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def disturb(run: Run, chosen: argparse.Namespace) -> list[str]:
    """Delivers the faults while the job makes progress; what was done."""
    source, done, stopped = random.Random(chosen.seed), [], []
    due = 0.0
    while len(done) < chosen.faults and run.process.poll() is None:
        time.sleep(0.02)
        now = time.monotonic()
        for process, until in list(stopped):
            if now > until:
                os.kill(process, signal.SIGCONT)
                stopped.remove((process, until))
        held = [process for process, _ in stopped]
        alive = [p for p in run.workers() if p not in held]
        if now < due or not run.steps() or len(alive) < 3:
            continue
        victim = source.choice(alive)
        if source.random() < 0.3:
            os.kill(victim, signal.SIGSTOP)
            stopped.append((victim, now + 3.0))
            done.append("stop")
        else:
            os.kill(victim, signal.SIGKILL)
            done.append("kill")
        due = now + source.uniform(0.5, 3.0)
    for process, _ in stopped:
        os.kill(process, signal.SIGCONT)
    return done


def check(folder: Path, chosen: argparse.Namespace) -> tuple[list[float], int, int]:
    """(losses, sequences that were worked through again, changes of the members from step to step); exits when a step
    or sequence is missing or twice."""
    metrics, ledger, plans = (rows(folder / f"{name}.jsonl") for name in ("metrics", "ledger", "plan"))
    for name, lines in (("metrics", metrics), ("ledger", ledger), ("plan", plans)):
        assert [line["step"] for line in lines] == list(range(1, chosen.steps + 1)), name
    sampler = Sampler([len(s) for s in data()], batch_tokens=BATCH_TOKENS, seed=0)
    for line in ledger:
        trained = sorted(place for places in line["trained"].values() for place in places)
        assert trained == list(range(len(sampler.next_batch().lengths))), f"step {line['step']} trained {trained}"
    again = sum(len(repair["sequences"]) for line in plans for repair in line["measured"]["repairs"])
    members = [line["measured"]["members"] for line in plans]
    return [row["loss"] for row in metrics], again, sum(a != b for a, b in pairwise(members))


def main() -> None:
    chosen = options()
    if chosen.worker is not None:
        work(chosen.worker, chosen.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        calm = Run(Path(name) / "calm/run", chosen)
        calm_digests, calm_seconds = calm.finish()
        storm = Run(Path(name) / "storm/run", chosen)
        faults = disturb(storm, chosen)
        digests, seconds = storm.finish()
        expected, _, _ = check(calm.folder, chosen)
        losses, again, changes = check(storm.folder, chosen)
    assert len(set(digests)) == 1 and len(set(calm_digests)) == 1, (digests, calm_digests)
    apart = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    print(
        f"{chosen.ranks} ranks, {chosen.steps} steps, {len(faults)} faults ({faults.count('stop')} stops), "
        f"the members changed {changes} times"
    )
    print(f"members at the end {len(digests)}, the same bits; every sequence of every step once; {again} done again")
    print(f"loss {expected[0]:.3f} -> {expected[-1]:.4f} undisturbed, -> {losses[-1]:.4f} through the faults; ")
    print(f"largest difference of a step {max(apart):.1e}, median {statistics.median(apart):.1e}")
    print(f"{seconds:.1f} s against {calm_seconds:.1f} s undisturbed ({seconds / calm_seconds:.2f}x)")


if __name__ == "__main__":
    main()
