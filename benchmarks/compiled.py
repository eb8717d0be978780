"""Training steps of a compiled model against the same model uncompiled, under the Trainer.

    python benchmarks/compiled.py [--ranks 2] [--steps 24] [--repeats 3]

Compiles with torch's default backend (inductor; it needs a C++ compiler), layer by layer or the whole model. Runs take
turns: uncompiled, layers, model, and again. Reported is the median of the ratios of each step's seconds to those of the
same step uncompiled, without the first steps, in which graphs are made for the first shapes that passes have; and the
largest relative difference of losses. Ranks are threads' worth of cores: more ranks than cores time nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import heteromesh as hm
from llama import Llama, LlamaConfig

WARM = 8
KINDS = ("uncompiled", "layers", "model")
BATCH_TOKENS = 4096
LONGEST = 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        train(chosen.worker, chosen.run_dir, chosen.steps)
        return
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    apart = 0.0
    for turn in range(chosen.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rows = {kind: run(chosen, kind, Path(folder) / kind) for kind in KINDS}
        plain = rows.pop("uncompiled")
        for kind, found in rows.items():
            pairs = list(zip(found, plain, strict=True))
            apart = max(apart, *(abs(a["loss"] / b["loss"] - 1) for a, b in pairs))
            ratios[kind] += (these := [a["measured_seconds"] / b["measured_seconds"] for a, b in pairs[WARM:]])
            print(f"turn {turn + 1}, {kind}: {statistics.median(these):.3f}x uncompiled", flush=True)
    for kind, these in ratios.items():
        low, high = sorted(these)[len(these) // 4], sorted(these)[-1 - len(these) // 4]
        middle = f"median of {len(these)} steps {statistics.median(these):.3f}x uncompiled"
        print(f"{chosen.ranks} ranks, {kind}: {middle} (quartiles {low:.3f}x to {high:.3f}x)")
    print(f"losses differ by at most {apart:.1e} (relative)")


def run(chosen: argparse.Namespace, kind: str, folder: Path) -> list[dict[str, float]]:
    """Returns the rows of the run's metrics."""
    command = [sys.executable, "-m", "heteromesh", "run", "--nproc-per-node", str(chosen.ranks), __file__]
    command += ["--worker", kind, "--run-dir", str(folder), "--steps", str(chosen.steps)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(kind: str, folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: torch.nn.Module = Llama(LlamaConfig())
    if kind == "layers":
        for layer in model.layers:  # type: ignore[union-attr]
            layer.compile()
    elif kind == "model":
        model = torch.compile(model)  # type: ignore[assignment]
    draw = random.Random(0)
    data = [torch.randint(256, (int(min(LONGEST, draw.lognormvariate(5.5, 1) + 8)),)) for _ in range(256)]
    hm.Trainer(model, None, data, hm.TrainerConfig(batch_tokens=BATCH_TOKENS, max_steps=steps, run_dir=folder)).fit()


if __name__ == "__main__":
    main()
