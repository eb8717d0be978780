"""Steps of a compiled model against steps of the same model uncompiled, on one and on two ranks.

    python benchmarks/compiled.py [--ranks 1 2] [--steps 40] [--turns 3]

In each turn `heteromesh run` trains the example's Llama three times on the same batches and plans: as written, with
every layer compiled (`layer.compile(dynamic=True)`), and compiled as a whole (`torch.compile(model, dynamic=True)`);
inductor, torch's default compiler. Reported is, over the turns, each compiled run's seconds of the steps in the second
half of the run (the first half holds the compilation) over those of the run as written in the same turn. Losses must be
equal.
Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import heteromesh as hm

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from llama import Llama, LlamaConfig

KINDS = ("as written", "layers", "model")
LENGTHS = (1024, 96, 700, 1500, 333, 512, 64, 900)
BATCH_TOKENS = 4096
COST = """
seconds_per_token2 = 2e-8
seconds_per_token = 1e-4
seconds_per_pass = 1e-3
bytes_per_token = 16384
tokens_per_device = 4096
[bytes_per_second]
2 = 1e9
"""


def work(folder: Path, kind: str, steps: int) -> None:
    """One rank of one run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = Llama(LlamaConfig())
    if kind == "layers":
        for layer in model.layers:
            layer.compile(dynamic=True)
    elif kind == "model":
        model = torch.compile(model, dynamic=True)
    source = torch.Generator().manual_seed(1)
    data = [torch.randint(256, (n,), generator=source) for n in LENGTHS * 4]
    config = hm.TrainerConfig(
        batch_tokens=BATCH_TOKENS, max_steps=steps, run_dir=folder, cost=folder.parent / "cost.toml", print_plans=0
    )
    hm.Trainer(model, None, data, config).fit()


def train(ranks: int, kind: str, steps: int) -> tuple[list[float], list[float]]:
    """Returns a run's losses and seconds, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cost.toml").write_text(COST)
        run = Path(folder) / "run"
        words = [sys.executable, "-m", "heteromesh", "run", "--nproc-per-node", str(ranks), __file__]
        words += ["--worker", str(run), "--kind", kind, "--steps", str(steps)]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=1800, check=False)
        if ended.returncode:
            raise SystemExit(f"{kind} on {ranks} ranks failed:\n{ended.stdout[-2000:]}{ended.stderr[-3000:]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], [row["measured_seconds"] for row in rows]


def compare(ranks: int, steps: int, turns: int) -> None:
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    for turn in range(turns):
        seconds = {}
        losses: list[float] = []
        for kind in KINDS:
            found, times = train(ranks, kind, steps)
            losses = losses or found
            worst = max(abs(a - b) / b for a, b in zip(found, losses, strict=True))
            if worst > 1e-4:
                raise SystemExit(f"{kind} on {ranks} ranks: losses differ by {worst:.1e}")
            seconds[kind] = sum(times[steps // 2 :])
            print(
                f"{ranks} ranks, turn {turn + 1}, {kind}: {seconds[kind]:.2f} s for {steps - steps // 2} steps, "
                f"first step {times[0]:.1f} s, losses within {worst:.1e}",
                flush=True,
            )
        for kind, row in ratios.items():
            row.append(seconds[kind] / seconds["as written"])
    for kind, row in ratios.items():
        spread = f"{min(row):.3f}x to {max(row):.3f}x"
        print(f"{ranks} ranks: {kind} compiled / as written: median {statistics.median(row):.3f}x ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.kind, chosen.steps)
        return
    for ranks in chosen.ranks:
        compare(ranks, chosen.steps, chosen.turns)


if __name__ == "__main__":
    main()
