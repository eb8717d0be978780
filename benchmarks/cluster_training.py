"""Training on emulated clusters: Heteromesh against DDP, DeepSpeed ZeRO-1 and FSDP2 on the same work.

    python benchmarks/cluster_training.py [CLUSTER.toml ...] [--workloads tail,short] [--repeats 2] [--steps 6]

Root on Linux (see docs/sandbox.md); DeepSpeed is left out where it is not installed (`pip install -e '.[deepspeed]'`).
Every system trains the same model on the same batches with the same loss (`training_peers.py`; checked). Each peer is
tuned first, on the first steps of the same batches: whole sequences dealt out by cost in proportion to the devices'
speeds, with two sizes of gradient bucket; and blocks of ranks that split every sequence evenly, sequences dealt to the
blocks in the same way. The fastest layout of each of the two kinds is then run in turns with the others. Reported are
tokens per second without the first step: medians over the repeats, their range, and the ratio to Heteromesh in the same
turn. Further flags go to `training_peers.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heteromesh.planner.cluster.cluster import load_cluster

HERE = Path(__file__).parent
CLUSTERS = [HERE.parent / "examples/clusters" / f"sandbox-{name}.toml" for name in ("motley", "unequal", "equal")]
WORKLOADS = {
    "tail": ("--lengths", "lognormal:7.2,1.5,16384", "--batch-tokens", "16384"),
    "short": ("--max-length", "2048", "--batch-tokens", "16384"),
}
"""tail: lengths as in CommonCrawl (a lognormal fitted to published figures), longer ones dropped. short: documents cut
at 2048 tokens, so that whole sequences can be dealt out evenly."""
WARM = 1
"""Steps that don't count: they allocate, and DDP sums gradients after its first backward."""


@dataclass(frozen=True)
class Layout:
    """A system and its settings."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What a run came to, one entry a step."""

    seconds: list[float]
    tokens: list[int]
    losses: list[float]
    exposed: list[float] | None = None
    """Seconds of the gradient sum, and of exchanges inside passes, that nothing hid (Heteromesh only)."""

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens[WARM:]) / sum(self.seconds[WARM:])

    @property
    def exposed_share(self) -> float | None:
        """Of the steps' time."""
        return sum(self.exposed[WARM:]) / sum(self.seconds[WARM:]) if self.exposed else None


def options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clusters", nargs="*", type=Path, default=CLUSTERS)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tuning-steps", type=int, default=2)
    parser.add_argument("--systems", default="ddp,zero1,fsdp2")
    parser.add_argument("--kinds", default="whole,split", help="of the peers' layouts")
    parser.add_argument("--ours", default="heteromesh")
    parser.add_argument("--cores", type=float, default=0.9 * (os.cpu_count() or 1), help="shared out by the sandbox")
    parser.add_argument(
        "--before", default="", help="words before each run's command, such as one that waits for quiet"
    )
    parser.add_argument("--record", type=Path, help="file to which runs are added; those it has are not run again")
    parser.add_argument("--json", action="store_true", help="one JSON document a system in place of the summary")
    return parser.parse_known_args()


def once(cluster: Path, layout: Layout, steps: int, chosen: argparse.Namespace, model: list[str], turn: str) -> Run:
    """The run of this turn, if need be from the record."""
    key = json.dumps([cluster.name, layout.flags, steps, chosen.cores, model, turn])
    if chosen.record and chosen.record.exists():
        for line in chosen.record.read_text().splitlines():
            known, values = json.loads(line)
            if known == key:
                return Run(**values)
    run = launch(cluster, layout, steps, chosen, model)
    if chosen.record:
        with chosen.record.open("a") as file:
            file.write(json.dumps([key, asdict(run)]) + "\n")
    return run


def launch(cluster: Path, layout: Layout, steps: int, chosen: argparse.Namespace, model: list[str]) -> Run:
    """One run in the sandbox. Raises RuntimeError with the end of its output when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        words = [*shlex.split(chosen.before), sys.executable, "-m", "heteromesh", "sandbox", str(cluster)]
        words += ["--cores", str(chosen.cores), "--"]
        words += [sys.executable, "-m", "torch.distributed.run", str(HERE / "training_peers.py")]
        words += [*layout.flags, "--steps", str(steps), "--output", str(output), *model]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=2400)
        if done.returncode or not output.exists():
            raise RuntimeError(f"{layout.name} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
        result: dict[str, Any] = json.loads(output.read_text())
    return Run(result["seconds"], result["tokens"], result["losses"], result.get("exposed"))


def candidates(system: str, speeds: tuple[float, ...]) -> tuple[list[Layout], list[Layout]]:
    """Static layouts of a peer: whole sequences, and split ones."""
    flags: tuple[str, ...] = ("--system", system)
    if len(set(speeds)) > 1:
        flags += ("--speeds", ",".join(f"{v:g}" for v in speeds))
    # FSDP2 has no size of buckets: it is wrapped layer by layer or as a whole
    sizes = {"0": "unwrapped layers", "25": "wrapped layers"} if system == "fsdp2" else {"2": "2 MB", "25": "25 MB"}
    whole = [Layout(f"{system}, {name}", (*flags, "--bucket-mb", mb)) for mb, name in sizes.items()]
    degrees = [d for d in range(2, len(speeds) + 1) if len(speeds) % d == 0]
    return whole, [Layout(f"{system}, split over {d}", (*flags, "--degree", str(d))) for d in degrees]


def tune(cluster: Path, system: str, chosen: argparse.Namespace, model: list[str]) -> list[Layout]:
    """The fastest layout of whole sequences and the fastest of split ones."""

    def fastest(layouts: list[Layout]) -> Layout:
        rates = {}
        for layout in layouts:
            rates[layout] = once(cluster, layout, chosen.tuning_steps, chosen, model, "tuning").tokens_per_second
            print(f"  tuning: {layout.name:<30} {rates[layout]:8,.0f} tokens/s", flush=True)
        return max(layouts, key=lambda layout: rates[layout])

    whole, split = candidates(system, load_cluster(cluster).speeds())
    best = fastest(whole)
    bucket = best.flags[best.flags.index("--bucket-mb") :]
    kinds = chosen.kinds.split(",")
    found = [best] if "whole" in kinds else []
    return found + ([fastest([Layout(s.name, (*s.flags, *bucket)) for s in split])] if "split" in kinds else [])


def compare(cluster: Path, chosen: argparse.Namespace, model: list[str]) -> dict[str, list[Run]]:
    layouts = [Layout(name, ("--system", name)) for name in chosen.ours.split(",")]
    for system in filter(None, chosen.systems.split(",")):
        if system == "zero1" and importlib.util.find_spec("deepspeed") is None:
            print("  zero1 left out: DeepSpeed is not installed (pip install -e '.[deepspeed]')")
            continue
        layouts += tune(cluster, system, chosen, model)
    runs: dict[str, list[Run]] = {layout.name: [] for layout in layouts}
    for turn in range(chosen.repeats):
        for layout in reversed(layouts) if turn % 2 else layouts:
            run = once(cluster, layout, chosen.steps, chosen, model, str(turn))
            runs[layout.name].append(run)
            print(f"  turn {turn}: {layout.name:<30} {run.tokens_per_second:8,.0f} tokens/s", flush=True)
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
        exposed = [run.exposed_share for run in several if run.exposed_share is not None]
        if chosen.json:
            row = {"layout": name, "tokens_per_second": rates, "ratios": ratios, "exposed_share": exposed}
            print(json.dumps(row | {"seconds": [run.seconds for run in several]}))
            continue
        print(
            f"  {name:<30} {statistics.median(rates):8,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}); "
            f"{next(iter(runs))} is {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            + (f"; {statistics.median(exposed):.1%} of a step is exposed communication" if exposed else "")
        )


def main() -> None:
    chosen, model = options()
    for cluster in chosen.clusters:
        for workload in chosen.workloads.split(","):
            print(f"{cluster.name}, {workload}:", flush=True)
            show(compare(cluster, chosen, [*WORKLOADS[workload], *model]), chosen)


if __name__ == "__main__":
    main()
