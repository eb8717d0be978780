"""A model that exceeds a control group's memory by its optimizer state: killed, and trained with the disk tier.

    python benchmarks/offload_limit.py [--gigabytes 0.74] [--steps 3]

Root on Linux, with control groups of memory. A model of 30.7 M parameters (123 MB of weights, as much of gradients, 245
MB of state) is trained three times, each time by a process of its own: without a limit; limited, with
offload_optimizer="none"; limited, with "auto". Told are losses, where the state was, memory, and how each ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import heteromesh as hm
from heteromesh.runtime.sandbox.quota import find_controller

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from llama import Llama, LlamaConfig

SIZES = LlamaConfig(vocab=500, layers=10, hidden=512, heads=8, kv_heads=2, intermediate=1536)
TOKENS = 200


def train(folder: Path, steps: int, offload: Any) -> None:
    """Trains in this process; writes the losses."""
    torch.manual_seed(0)
    model = Llama(SIZES)
    data = [torch.arange(i, i + 30 + 7 * i) % SIZES.vocab for i in range(16)]
    config = hm.TrainerConfig(
        batch_tokens=TOKENS,
        max_steps=steps,
        run_dir=folder / "run",
        offload_optimizer=offload,
        tokens_per_device=TOKENS,
    )
    report = hm.Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), data, config).fit()
    (folder / "losses.json").write_text(json.dumps(report.losses))


def run(folder: Path, steps: int, offload: str, limit: float | None) -> list[float] | None:
    """Returns the losses of a run in a process of its own; None where it was killed. limit: bytes of memory."""
    words = [sys.executable, __file__, "--folder", str(folder), "--steps", str(steps), "--offload", offload]
    controller = find_controller("memory")
    group = controller.root / f"heteromesh-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        if limit is not None:
            controller.limit(group, limit)
        join = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *words]
        ended = subprocess.run(join, check=False, capture_output=True, text=True)
    finally:
        while (group / "cgroup.procs").read_text():  # the planner's process ends when it sees that its parent has
            time.sleep(0.1)
        group.rmdir()
    if ended.returncode in (-9, 137):
        return None
    if ended.returncode:
        raise SystemExit(ended.stderr or ended.stdout)
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def told(folder: Path, losses: list[float] | None) -> str:
    if losses is None:
        return "killed: out of memory"
    (rank,) = json.loads((folder / "run/memory.json").read_text())["ranks"]
    moments = ", ".join(f"{size / 1e9:.3f} on {tier}" for tier, size in rank["moments"].items() if size)
    predicted = sum(rank["predicted"].values())
    return (
        f"losses {' '.join(f'{loss:.6f}' for loss in losses)}; GB of moments {moments}; memory predicted "
        f"{predicted / 1e9:.3f} GB, measured {rank['measured'] / 1e9:.3f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.74, help="the limit")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--offload", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.folder is not None:
        train(chosen.folder, chosen.steps, chosen.offload)
        return
    with tempfile.TemporaryDirectory() as name:
        for title, offload, limit in (
            ("no limit", "none", None),
            (f"{chosen.gigabytes:g} GB, offload_optimizer='none'", "none", chosen.gigabytes * 1e9),
            (f"{chosen.gigabytes:g} GB, offload_optimizer='auto'", "auto", chosen.gigabytes * 1e9),
        ):
            folder = Path(name) / title.replace(" ", "-")
            folder.mkdir()
            print(f"{title}: {told(folder, run(folder, chosen.steps, offload, limit))}", flush=True)


if __name__ == "__main__":
    main()
