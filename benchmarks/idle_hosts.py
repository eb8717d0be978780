"""A cluster with a host that costs more than it brings: steps with it left out, and with all hosts working.

    python benchmarks/idle_hosts.py [CLUSTER.toml] [--steps 8] [--turns 2]

Root on Linux (docs/sandbox.md). The example's Llama trains on the same batches in the sandbox, in turns with
`idle_hosts=True`, where the Trainer chooses who works, and with `idle_hosts=False`. Reported are the seconds of the
steps without the first, their ratio turn by turn, and what the choice predicted for both. Losses must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import heteromesh as hm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from llama import Llama, LlamaConfig

CLUSTER = ROOT / "examples" / "clusters" / "sandbox-weak-host.toml"
LENGTHS = (1024, 96, 700, 1500, 333, 512, 64, 900)
BATCH_TOKENS = 6144
FREE = 0.9
"""Of the cores: the rest is for what runs beside."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run's steps, and what config.json says of who works."""

    losses: list[float]
    seconds: list[float]
    participation: dict[str, Any] | None


def work(folder: Path, cluster: Path, idle: bool, steps: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = torch.Generator().manual_seed(1)
    data = [torch.randint(256, (n,), generator=source) for n in LENGTHS * 4]
    config = hm.TrainerConfig(
        batch_tokens=BATCH_TOKENS, max_steps=steps, run_dir=folder, cluster=cluster, idle_hosts=idle, print_plans=0
    )
    hm.Trainer(Llama(LlamaConfig()), None, data, config).fit()


def train(cluster: Path, idle: bool, steps: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [
            sys.executable,
            "-m",
            "heteromesh",
            "sandbox",
            str(cluster),
            "--cores",
            str(FREE * (os.cpu_count() or 1)),
        ]
        words += ["--", sys.executable, "-m", "heteromesh", "run", __file__, str(cluster)]
        words += ["--worker", str(run), "--steps", str(steps), *(["--idle"] if idle else [])]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=1800, check=False)
        if ended.returncode:
            raise SystemExit(f"the run failed:\n{ended.stdout[-2000:]}{ended.stderr[-3000:]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        participation = json.loads((run / "config.json").read_text())["participation"]
    return Run([row["loss"] for row in rows], [row["measured_seconds"] for row in rows], participation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", type=Path, nargs="?", default=CLUSTER)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.cluster, chosen.idle, chosen.steps)
        return
    ratios = []
    for turn in range(chosen.turns):
        left_out, everyone = (train(chosen.cluster, idle, chosen.steps) for idle in (True, False))
        worst = max(abs(a - b) / b for a, b in zip(left_out.losses, everyone.losses, strict=True))
        if worst > 1e-4:
            raise SystemExit(f"losses differ by {worst:.1e}")
        seconds = [statistics.median(run.seconds[1:]) for run in (left_out, everyone)]
        ratios.append(sum(everyone.seconds[1:]) / sum(left_out.seconds[1:]))
        told = left_out.participation
        predicted = f"{told['seconds']:.3g} s and {told['everyone_seconds']:.3g} s" if told else "everyone works"
        print(
            f"turn {turn + 1}: a step {seconds[0]:.2f} s as chosen ({told and told['ranks']}), {seconds[1]:.2f} s with "
            f"all; predicted {predicted}; {ratios[-1]:.2f}x; losses within {worst:.1e}",
            flush=True,
        )
    print(f"as chosen against all hosts: {statistics.median(ratios):.2f}x ({min(ratios):.2f}x to {max(ratios):.2f}x)")


if __name__ == "__main__":
    main()
