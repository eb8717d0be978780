"""A model that doesn't fit a cluster's small hosts: Heteromesh against FSDP2 and DeepSpeed ZeRO-3, memory limited.

    python benchmarks/memory_limits.py [--cluster FILE] [--steps 4] [--turns 2] [--systems fsdp2,zero3] [...]

Root on Linux (docs/sandbox.md): a host that uses more memory than its devices have is killed. DeepSpeed is left out
where it is not installed. Every system trains the same model from the same file on the same batches
(`memory_peers.py`, which takes all further flags). A peer is tried first, for two steps, on the hosts with the most
memory, for every number of these, with layers kept or gathered anew, with and without recomputation, in micro-batches
of two sizes; what is killed is told, and where the most frugal of them is killed the others are not tried. Its fastest
layout then runs in turns with Heteromesh on all hosts. Reported are tokens per second without the first step, the ratio
of each turn, and the most memory that each rank had. Losses must be equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import memory_peers
import torch
from cluster_training import Run
from safetensors.torch import save_file

from heteromesh.planner.cluster.cluster import Cluster, load_cluster
from heteromesh.planner.cluster.files import cluster_toml

HERE = Path(__file__).parent
CLUSTER = HERE.parent / "examples" / "clusters" / "sandbox-memory.toml"
FREE = 0.9
"""Of the cores: the rest is for what runs beside."""
TRIED = 2
"""Steps of a layout that is tried."""
LIMIT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Layout:
    """A system, its settings, and on how many hosts it runs."""

    name: str
    hosts: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class LimitedRun(Run):
    """What a run came to; by rank the peak of its memory in bytes, too."""

    peaks: tuple[float, ...] = ()


def layouts(system: str, hosts: int, micro_tokens: Sequence[int]) -> Iterator[Layout]:
    """Yields what a peer may do on so many hosts, what needs the least memory first."""
    keeping: dict[str, tuple[tuple[str, ...], ...]] = {"fsdp2": ((), ("--keep", "--defer")), "zero3": ((),)}
    for recomputed in (("--checkpoint",), ()):
        for micro in sorted(micro_tokens, key=lambda n: n or sys.maxsize):
            for keep in keeping[system] if hosts > 1 else ((),):
                flags = ("--system", system, *recomputed, *keep, "--micro-tokens", str(micro))
                told = " ".join(flags[1:]).replace("--", "")
                yield Layout(f"{told}, {hosts} host{'s' * (hosts > 1)}", hosts, flags)


def of_hosts(cluster: Cluster, count: int) -> Cluster:
    """Returns the cluster of the hosts with the most memory."""
    order = sorted(cluster.hosts, key=lambda h: -cluster.devices[h.device].memory_gb)[:count]
    return cluster.subset([r for r, h in enumerate(cluster.rank_hosts) if cluster.hosts[h] in order])


def run(
    layout: Layout, cluster: Cluster, steps: int, folder: Path, chosen: argparse.Namespace, more: list[str]
) -> LimitedRun | str:
    """Returns the run, or in a few words why there is none."""
    part = of_hosts(cluster, layout.hosts)
    file, output = folder / "cluster.toml", folder / "run.json"
    output.unlink(missing_ok=True)
    shutil.rmtree(output.with_suffix(".run"), ignore_errors=True)
    file.write_text(cluster_toml(part))
    speeds = part.speeds()
    cores = chosen.cores * sum(speeds) / sum(cluster.speeds())
    words = [
        sys.executable,
        "-m",
        "heteromesh",
        "sandbox",
        str(file),
        "--limit-memory",
        "--cores",
        f"{cores:.3f}",
        "--",
    ]
    words += [sys.executable, "-m", "torch.distributed.run", str(HERE / "memory_peers.py"), *layout.flags]
    words += ["--weights", str(folder / "weights.safetensors"), "--speeds", ",".join(f"{v:g}" for v in speeds)]
    words += ["--steps", str(steps), "--output", str(output), *more]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT_SECONDS} s"
    if not output.exists():
        told = ended.stdout + ended.stderr
        if "SIGKILL" in told or "-9" in told or ended.returncode == 137:
            return "killed: out of memory"
        return f"failed: {told[-1500:]}" if chosen.verbose else f"failed ({ended.returncode})"
    result = json.loads(output.read_text())
    return LimitedRun(result["seconds"], result["tokens"], result["losses"], peaks=tuple(result["peaks"]))


def best_of(system: str, cluster: Cluster, folder: Path, chosen: argparse.Namespace, more: list[str]) -> Layout | None:
    """Returns a peer's fastest layout of those that are tried; None where all are killed."""
    found: dict[Layout, float] = {}
    for hosts in range(1, len(cluster.hosts) + 1):
        for number, layout in enumerate(layouts(system, hosts, chosen.micro_tokens)):
            tried = run(layout, cluster, TRIED, folder, chosen, more)
            print(f"  {layout.name}: {tried if isinstance(tried, str) else told(tried)}", flush=True)
            if isinstance(tried, LimitedRun):
                found[layout] = tried.tokens_per_second
            elif number == 0:
                break  # the others need more memory
    return max(found, key=lambda layout: found[layout]) if found else None


def told(done: LimitedRun) -> str:
    peaks = " / ".join(f"{peak / 1e9:.2f}" for peak in done.peaks)
    return f"{done.tokens_per_second:,.1f} tokens/s, peaks {peaks} GB"


def compare(layout: Layout, cluster: Cluster, folder: Path, chosen: argparse.Namespace, more: list[str]) -> list[float]:
    """Returns by turn how many times as fast Heteromesh is."""
    ours = Layout("heteromesh", len(cluster.hosts), ("--system", "heteromesh"))
    ratios = []
    for turn in range(chosen.turns):
        order = (ours, layout) if turn % 2 == 0 else (layout, ours)
        runs = {each: run(each, cluster, chosen.steps, folder, chosen, more) for each in order}
        for each, done in runs.items():
            print(f"turn {turn + 1}: {each.name}: {done if isinstance(done, str) else told(done)}", flush=True)
        mine, theirs = runs[ours], runs[layout]
        if isinstance(mine, str) or isinstance(theirs, str):
            raise SystemExit("a run that had worked did not")
        worst = max(abs(a - b) / b for a, b in zip(mine.losses, theirs.losses, strict=True))
        if worst > 1e-3:
            raise SystemExit(f"losses differ by {worst:.1e}")
        ratios.append(mine.tokens_per_second / theirs.tokens_per_second)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--systems", default="fsdp2,zero3")
    parser.add_argument("--micro-tokens", type=lambda s: [int(n) for n in s.split(",")], default=[0, 1024])
    parser.add_argument("--cores", type=float, default=FREE * (os.cpu_count() or 1))
    parser.add_argument("--verbose", action="store_true", help="the end of the output of what failed")
    chosen, more = parser.parse_known_args()
    cluster = load_cluster(chosen.cluster)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = memory_peers.make_model(memory_peers.options(["--system", "heteromesh", *more]))
        print(f"{cluster.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)
        save_file(model.state_dict(), folder / "weights.safetensors")
        del model
        for system in filter(None, chosen.systems.split(",")):
            if system == "zero3" and importlib.util.find_spec("deepspeed") is None:
                print("zero3 left out: DeepSpeed is not installed (pip install -e '.[deepspeed]')")
                continue
            best = best_of(system, cluster, folder, chosen, more)
            if best is None:
                print(f"{system}: nothing that was tried fits", flush=True)
                continue
            ratios = compare(best, cluster, folder, chosen, more)
            print(
                f"{best.name}: heteromesh is {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
