"""All-reduce by owners as the plan wants them, beside gloo's own, on emulated clusters (Linux, root).

    python benchmarks/all_reduce.py [--megabytes 20] [--repeats 10] [--buckets 1] [--json]

Clusters of one-device hosts: 2 x 1 Gbit/s + 2 x 200 Mbit/s, 6 + 2 of the same, 4 x 200 Mbit/s, and 2 with two cards of
200 Mbit/s + 2 with one of 400 Mbit/s. In every repeat each way runs once, in random order: `planned` (what a run uses),
`owners` (never gloo's ring), `gloo`, all by the first card of each host, and where a host has several `cards` (owners,
over all cards). The time of a repeat is rank 0's, from one barrier to the next. Physical limit: the tensor's bytes over
the slowest host's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from heteromesh.comm.collectives.gloo import GlooTransport
from heteromesh.comm.collectives.uneven import UnevenCollectives, open_collectives
from heteromesh.comm.nics.connect import open_nics
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.planner.reduction.nics import nic_rates, split
from heteromesh.planner.reduction.reduction import reduction_for

CLUSTERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "2 + 2": ((1.0,),) * 2 + ((0.2,),) * 2,
    "6 + 2": ((1.0,),) * 6 + ((0.2,),) * 2,
    "equal": ((0.2,),) * 4,
    "cards": ((0.2, 0.2),) * 2 + ((0.4,),) * 2,
}
"""Gbit/s of each card of each host."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--buckets", type=int, default=1, help="cut the tensor into so many all-reduces at once")
    parser.add_argument("--clusters", nargs="*", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=CLUSTERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def cluster(name: str, most_cards: int | None = None) -> Cluster:
    hosts = tuple(
        Host(
            name=f"host{i}", device="cpu", count=1, nics=tuple(Nic(kind="ethernet", gbit=r) for r in rates[:most_cards])
        )
        for i, rates in enumerate(CLUSTERS[name])
    )
    return Cluster(name=name, hosts=hosts, devices={"cpu": CATALOG["cpu"]})


def work(chosen: argparse.Namespace) -> None:
    rank, size = int(os.environ["RANK"]), len(CLUSTERS[chosen.worker])
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["ALL_REDUCE_STORE"], size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    groups = [dist.new_group() for _ in range(3)]
    reduction = reduction_for(cluster(chosen.worker, most_cards=1))
    planned, owners = open_collectives(groups[0], reduction), UnevenCollectives(GlooTransport(groups[1]), reduction)
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "planned": planned.all_reduce,
        "owners": owners.all_reduce,
        "gloo": lambda part: dist.all_reduce(part, group=groups[2], async_op=True),
    }
    over_cards = None
    if any(len(rates) > 1 for rates in CLUSTERS[chosen.worker]):
        over_cards = over_all_nics(groups[0], cluster(chosen.worker))
        ways["cards"] = over_cards.all_reduce
    seconds = measure(ways, chosen, size)
    if rank == 0:
        print(json.dumps({"seconds": seconds, "ring": reduction.ring, "fractions": reduction.fractions}), flush=True)
    planned.close()
    owners.close()
    if over_cards is not None:
        over_cards.close()
    dist.barrier()
    dist.destroy_process_group()


def over_all_nics(group: dist.ProcessGroup, described: Cluster) -> UnevenCollectives:
    reduction, rates = reduction_for(described), nic_rates(described)
    addresses = os.environ["ALL_REDUCE_ADDRESSES"].split(",")
    cards = [len(its) for its in rates]
    transport = open_nics(group, addresses, reduction.hosts, cards, split(reduction, rates))
    return UnevenCollectives(transport, reduction)


def measure(
    ways: dict[str, Callable[[torch.Tensor], object]], chosen: argparse.Namespace, size: int
) -> dict[str, list[float]]:
    flat = torch.empty(int(chosen.megabytes * 1e6 / 4))
    parts = flat.chunk(chosen.buckets)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)  # the same on every rank
    for turn in range(chosen.repeats + 1):
        for name in order.sample(list(ways), len(ways)):
            flat.fill_(1)
            dist.barrier()
            start = time.perf_counter()
            for handle in [ways[name](part) for part in parts]:
                handle.wait()  # type: ignore[attr-defined]
            dist.barrier()
            if turn:  # the first opens connections
                seconds[name].append(time.perf_counter() - start)
            assert bool((flat == size).all())
    return seconds


def start(name: str) -> dict[str, dict[str, list[float]]]:
    from heteromesh.runtime.sandbox import Sandbox

    command = [sys.executable, __file__, "--worker", name, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder, Sandbox(cluster(name), quota=False) as sandbox:
        store = str(Path(folder) / "store")
        processes = [
            host.start(command, environment=environment | {"RANK": str(rank)}, piped=rank == 0)
            for rank, (host, environment) in enumerate(
                (
                    host,
                    {"ALL_REDUCE_STORE": store, "ALL_REDUCE_ADDRESSES": ",".join(i.address for i in host.interfaces)},
                )
                for host in sandbox.hosts
            )
        ]
        assert processes[0].streams is not None
        output = processes[0].streams[0].read()
        if any(process.wait(60) for process in processes):
            raise SystemExit(f"a rank of the cluster {name} failed")
        return json.loads(output)  # type: ignore[no-any-return]


def show(name: str, result: dict[str, dict[str, list[float]]], limit: float) -> None:
    gloo = result["seconds"]["gloo"]
    print(f"{name}: physical limit {limit:.2f} s, gloo's ring chosen: {result['ring']}")
    for way, seconds in result["seconds"].items():
        median = statistics.median(seconds)
        ratios = [g / s for g, s in zip(gloo, seconds, strict=True)]
        print(
            f"  {way:8s} {median:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), {limit / median:.0%} of the limit, "
            f"{statistics.median(ratios):.2f}x gloo's ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> int:
    chosen = options()
    if chosen.worker:
        work(chosen)
        return 0
    for name in chosen.clusters:
        result, limit = start(name), chosen.megabytes * 1e6 / (min(map(sum, CLUSTERS[name])) * 125e6)
        if chosen.json:
            print(json.dumps({"cluster": name, "limit": limit} | result))
        else:
            show(name, result, limit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
