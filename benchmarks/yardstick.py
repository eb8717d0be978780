"""How close a motley cluster comes to a uniform one of the same total speed, and what slow links cost.

    python benchmarks/yardstick.py [--turns 3] [--steps 6] [...]

Root on Linux (docs/sandbox.md). Three clusters of four hosts in the sandbox, all with the same sum of speeds: equal
ones; unlike ones in the ratio 8:5:4:3; and these with the links of two at 0.2 Gbit/s in place of 1. Each trains the
same model on the same long-tailed batches (`training_peers.py`, which takes all further flags), in turns. Reported are
tokens per second without the first step, motley over uniform, and what the slow links cost beside the least seconds
that the gradient sum takes on them: max(2 (p - 1) S / sum of rates, S / slowest rate), full duplex.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from cluster_training import WORKLOADS, Layout, Run, launch
from training_peers import make_model, open_data, options

from heteromesh.planner.cluster.catalog import Device
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.planner.cluster.files import cluster_toml

SPEEDS = {"uniform": (5.0, 5.0, 5.0, 5.0), "motley": (8.0, 5.0, 4.0, 3.0), "slow links": (8.0, 5.0, 4.0, 3.0)}
SLOW = (1, 3)
"""The hosts whose links are slow."""
GBIT, SLOW_GBIT = 1.0, 0.2
BYTES = 1e9 / 8


def cluster_of(name: str) -> Cluster:
    speeds = SPEEDS[name]
    devices = {
        f"device{i}": Device(tflops=v * 1e-3, memory_gb=4, memory_gbps=10, link_gbps=5) for i, v in enumerate(speeds)
    }
    rates = [SLOW_GBIT if name == "slow links" and i in SLOW else GBIT for i in range(len(speeds))]
    hosts = tuple(
        Host(name=f"h{i}", device=f"device{i}", count=1, nics=(Nic(kind="ethernet", gbit=rate),))
        for i, rate in enumerate(rates)
    )
    return Cluster(name=name.replace(" ", "-"), hosts=hosts, devices=devices)


def least_seconds(cluster: Cluster, nbytes: int) -> float:
    """Of a gradient sum over the hosts' links (full duplex)."""
    rates = [sum(nic.gbit for nic in host.nics) * BYTES for host in cluster.hosts]
    return max(2 * (len(rates) - 1) * nbytes / sum(rates), nbytes / min(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workload", choices=WORKLOADS, default="tail")
    parser.add_argument("--cores", type=float, default=0.9 * (os.cpu_count() or 1), help="shared out by the sandbox")
    parser.add_argument("--before", default="", help=argparse.SUPPRESS)
    chosen, model = parser.parse_known_args()
    clusters = {name: cluster_of(name) for name in SPEEDS}
    layout = Layout("heteromesh", ("--system", "heteromesh"))
    runs: dict[str, list[Run]] = {name: [] for name in clusters}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(chosen.turns):
            for name in list(clusters) if turn % 2 == 0 else list(clusters)[::-1]:
                file = Path(folder) / f"{clusters[name].name}.toml"
                file.write_text(cluster_toml(clusters[name]))
                done = launch(file, layout, chosen.steps, chosen, [*WORKLOADS[chosen.workload], *model])
                runs[name].append(done)
                print(f"turn {turn + 1}: {name}: {done.tokens_per_second:,.0f} tokens/s", flush=True)
    rates = {name: [run.tokens_per_second for run in several] for name, several in runs.items()}
    shares = [m / u for m, u in zip(rates["motley"], rates["uniform"], strict=True)]
    print(f"motley: {statistics.median(shares):.1%} of uniform ({min(shares):.1%} to {max(shares):.1%})")
    tell_links(runs, clusters, chosen, model)


def tell_links(
    runs: dict[str, list[Run]], clusters: dict[str, Cluster], chosen: argparse.Namespace, model: list[str]
) -> None:
    """Says what a step loses by slow links, and what a sum of gradients takes on them at least."""
    sizes = options(["--system", "heteromesh", "--output", "-", *WORKLOADS[chosen.workload], *model])
    nbytes = sum(p.nbytes for p in make_model(sizes, open_data(sizes)[1]).parameters())
    seconds = {name: statistics.median(s for run in several for s in run.seconds[1:]) for name, several in runs.items()}
    least = {name: least_seconds(cluster, nbytes) for name, cluster in clusters.items()}
    print(
        f"a step: {seconds['motley']:.2f} s, with two slow links {seconds['slow links']:.2f} s; the gradient sum of "
        f"{nbytes / 1e6:.0f} MB takes at least {least['motley']:.2f} s and {least['slow links']:.2f} s, of which the "
        "passes can hide all but the first part"
    )


if __name__ == "__main__":
    main()
