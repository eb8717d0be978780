"""Training on an emulated unequal cluster: Heteromesh against DDP, DeepSpeed ZeRO-1 and FSDP2 on the same work.

    python benchmarks/cluster_training.py [CLUSTER.toml ...] [--repeats 3] [--steps 8] [--systems ddp,zero1,fsdp2]

Root on Linux (see docs/sandbox.md); DeepSpeed is left out where it is not installed (`pip install -e '.[deepspeed]'`).
Every system trains the same model on the same batches with the same loss (`training_peers.py`; checked). Each peer is
tuned first: even shares and shares in proportion to the devices' speeds, each with two sizes of gradient bucket; its
fastest layout is then run in turns with the others. Reported are tokens per second without the first two steps: medians
over the repeats, their range, and the ratio to Heteromesh in the same turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from heteromesh.planner.cluster import load_cluster

HERE = Path(__file__).parent
CLUSTERS = [HERE.parent / "examples/clusters" / f"sandbox-{name}.toml" for name in ("unequal", "equal")]
WARM = 2


@dataclass(frozen=True)
class Layout:
    """A system and its settings."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What a run came to."""

    tokens_per_second: float
    losses: tuple[float, ...]


def options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clusters", nargs="*", type=Path, default=CLUSTERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tuning-steps", type=int, default=4)
    parser.add_argument("--systems", default="ddp,zero1,fsdp2")
    parser.add_argument("--ours", default="heteromesh,heteromesh-sharded")
    parser.add_argument("--cores", type=float, default=0.9 * (os.cpu_count() or 1), help="shared out by the sandbox")
    parser.add_argument("--json", action="store_true")
    return parser.parse_known_args()


def launch(cluster: Path, layout: Layout, steps: int, chosen: argparse.Namespace, model: list[str]) -> Run:
    """One run in the sandbox. Raises RuntimeError with the end of its output when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        words = [sys.executable, "-m", "heteromesh", "sandbox", str(cluster), "--cores", str(chosen.cores), "--"]
        words += [sys.executable, "-m", "torch.distributed.run", str(HERE / "training_peers.py")]
        words += [*layout.flags, "--steps", str(steps), "--output", str(output), *model]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=1200)
        if done.returncode or not output.exists():
            raise RuntimeError(f"{layout.name} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
        result = json.loads(output.read_text())
    return Run(sum(result["tokens"][WARM:]) / sum(result["seconds"][WARM:]), tuple(result["losses"]))


def candidates(system: str, speeds: tuple[float, ...]) -> list[Layout]:
    shares = {"even": (), "by speed": ("--speeds", ",".join(f"{v:g}" for v in speeds))}
    if len(set(speeds)) == 1:
        del shares["by speed"]
    buckets = {"fsdp2": (25,)}.get(system, (25, 2))
    return [
        Layout(f"{system}, {name}, {mb} MB", ("--system", system, "--bucket-mb", str(mb), *flags))
        for name, flags in shares.items()
        for mb in buckets
    ]


def tune(cluster: Path, system: str, chosen: argparse.Namespace, model: list[str]) -> Layout:
    tried = []
    for layout in candidates(system, load_cluster(cluster).speeds()):
        rate = launch(cluster, layout, chosen.tuning_steps, chosen, model).tokens_per_second
        print(f"  tuning: {layout.name:<28} {rate:8,.0f} tokens/s", flush=True)
        tried.append((rate, layout))
    return max(tried, key=lambda pair: pair[0])[1]


def compare(cluster: Path, chosen: argparse.Namespace, model: list[str]) -> dict[str, list[Run]]:
    layouts = [Layout(name, ("--system", name)) for name in chosen.ours.split(",")]
    for system in chosen.systems.split(","):
        if system == "zero1" and importlib.util.find_spec("deepspeed") is None:
            print("  zero1 left out: DeepSpeed is not installed (pip install -e '.[deepspeed]')")
            continue
        layouts.append(tune(cluster, system, chosen, model))
    runs: dict[str, list[Run]] = {layout.name: [] for layout in layouts}
    for turn in range(chosen.repeats):
        for layout in layouts if turn % 2 else reversed(layouts):
            runs[layout.name].append(launch(cluster, layout, chosen.steps, chosen, model))
            print(
                f"  turn {turn}: {layout.name:<28} {runs[layout.name][-1].tokens_per_second:8,.0f} tokens/s", flush=True
            )
    reference = runs[layouts[0].name][0].losses
    for name, several in runs.items():
        worst = max(abs(a - b) / b for run in several for a, b in zip(run.losses, reference, strict=True))
        assert worst < 1e-3, f"{name}: losses differ by {worst:.1e}"
    return runs


def show(runs: dict[str, list[Run]], chosen: argparse.Namespace) -> None:
    ours = runs[chosen.ours.split(",")[0]]
    for name, several in runs.items():
        rates = [run.tokens_per_second for run in several]
        ratios = [mine.tokens_per_second / run.tokens_per_second for mine, run in zip(ours, several, strict=True)]
        if chosen.json:
            print(json.dumps({"layout": name, "tokens_per_second": rates, "ratios": ratios}))
        else:
            print(
                f"  {name:<28} {statistics.median(rates):8,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}); "
                f"{next(iter(runs))} is {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def main() -> None:
    chosen, model = options()
    for cluster in chosen.clusters:
        print(f"{cluster.name}:", flush=True)
        show(compare(cluster, chosen, model), chosen)


if __name__ == "__main__":
    main()
