"""The planner's choice of who takes part beside the best of all subsets, on random clusters.

    python benchmarks/participation.py [--clusters 40] [--seed 0] [--json]

Clusters of 2 to 6 hosts with 1 to 4 devices each, NICs of 1 to 400 Gbit/s, some on a common fabric; a model of 0.4, 1.1
or 8 B parameters; 12 to 96 sequences a step. Brute force plans every set of hosts in every layout (replicated
weights, with a sharded optimizer, each with and without recomputation; sharded weights, with and without the idle hosts
as holders of state, inside fabrics, inside hosts), and where there are at most 64 of them every number of devices of
every host. Columns: clusters; the worst and the mean of the plan's seconds over the best; how often every host taking
part would have been worse by more than 2 %, and by how much at most; processor seconds of the decision.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.planner.cost.analytic import analytic_costs
from heteromesh.planner.model.spec import MODELS, ModelSpec
from heteromesh.planner.participation.layout import Setting
from heteromesh.planner.participation.replicated import recomputed, replicated, sharded_optimizer
from heteromesh.planner.participation.search import decide, plan_layout
from heteromesh.planner.participation.sharded import Part, groupings, sharded
from heteromesh.planner.sequences.bound import passes_bound

DEVICES = ("A100-80GB", "V100-32GB", "RTX-4090", "T4", "L4", "A10-24GB")
SMALL = ModelSpec(
    name="1.1b", layers=22, hidden=2048, heads=32, kv_heads=4, head_dim=64, intermediate=5632, vocab=32_000
)
TINY = replace(SMALL, name="0.4b", layers=24, hidden=1024, heads=16, kv_heads=16, intermediate=2816)
PLAN_SECONDS = 0.02
"""Processor time that a step's search may take, in both."""
DEVICE_SUBSETS = 64


def random_setting(rng: random.Random) -> Setting:
    """Returns a cluster, a model and a batch."""
    hosts = []
    for number in range(rng.randint(2, 6)):
        fabric = rng.choice(("", "", "ib0"))
        nics = [Nic(kind="ethernet", gbit=round(10 ** rng.uniform(0, 2.6), 2))]
        if fabric:
            nics.append(Nic(kind="infiniband", gbit=rng.choice((100.0, 200.0, 400.0))))
        device, count = rng.choice(DEVICES), rng.randint(1, 4)
        hosts.append(Host(name=f"h{number}", device=device, count=count, fabric=fabric, nics=tuple(nics)))
    cluster = Cluster(name="random", hosts=tuple(hosts), devices={h.device: CATALOG[h.device] for h in hosts})
    model = rng.choice((TINY, SMALL, SMALL, MODELS["llama-3-8b"]))
    lengths = (min(8192, int(rng.lognormvariate(7, 1.2)) + 1) for _ in range(rng.choice((12, 32, 96))))
    return Setting(cluster=cluster, model=model, batch=tuple(lengths))


def host_subsets(setting: Setting) -> Iterator[tuple[int, ...]]:
    """Yields the ranks of every set of hosts."""
    hosts = range(len(setting.cluster.hosts))
    for count in range(1, len(hosts) + 1):
        for chosen in itertools.combinations(hosts, count):
            yield tuple(r for h in chosen for r in setting.host_ranks[h])


def device_subsets(setting: Setting) -> Iterator[tuple[int, ...]]:
    """Yields the first ranks of every host, in every number; nothing where that is too many."""
    ranks = setting.host_ranks
    if math.prod(len(own) + 1 for own in ranks) > DEVICE_SUBSETS:
        return
    for counts in itertools.product(*(range(len(own) + 1) for own in ranks)):
        if any(counts):
            yield tuple(r for own, n in zip(ranks, counts, strict=True) for r in own[:n])


def best_seconds(setting: Setting, ranks: Sequence[int], limit: float = math.inf) -> float:
    """Returns the seconds of the best layout of these working ranks; infinite where none holds the model.

    limit: layouts whose transfers and update alone take longer are not planned.
    """
    chosen = tuple(ranks)
    layouts = list(filter(None, (replicated(setting, chosen), sharded_optimizer(setting, chosen))))
    layouts += [recomputed(setting, layout) for layout in layouts]
    working = {setting.cluster.rank_hosts[r] for r in chosen}
    idle = tuple(r for h, own in enumerate(setting.host_ranks) if h not in working for r in own)
    parts = [Part(chosen), Part(chosen, idle), *(Part(chosen, (), g) for g in groupings(setting, chosen))]
    costs = analytic_costs(
        setting.cluster.subset(chosen), setting.model, checkpointing=True, capacity=(setting.tokens,) * len(chosen)
    )
    passes = passes_bound(setting.batch, costs)
    layouts += filter(None, (sharded(setting, part, passes) for part in parts))
    best = limit
    for layout in sorted(layouts, key=lambda layout: layout.traffic.at_least(0.0)):
        if layout.traffic.at_least(0.0) + layout.update_seconds < best:
            planned = plan_layout(setting, layout, setting.batch, PLAN_SECONDS)
            best = min(best, planned.seconds if planned else math.inf)
    return best if best < limit else math.inf


def measure(setting: Setting) -> dict[str, Any] | None:
    """Returns a row; None where nothing holds the model."""
    began = time.process_time()
    decision = decide(setting, seconds=1.5, plan_seconds=PLAN_SECONDS)
    spent = time.process_time() - began
    limit = decision.best.seconds if decision is not None else math.inf
    subsets = {*host_subsets(setting), *device_subsets(setting)}
    best = min(limit, *(best_seconds(setting, ranks, limit) for ranks in subsets))
    if decision is None:
        assert math.isinf(best), "brute force holds what the search does not"
        return None
    everyone = best_seconds(setting, tuple(range(setting.cluster.ranks)))
    return {
        "hosts": len(setting.cluster.hosts),
        "ranks": setting.cluster.ranks,
        "model": setting.model.name,
        "subsets": len(subsets),
        "working": len(decision.best.layout.ranks),
        "holders": len(decision.best.layout.holders),
        "layout": decision.best.layout.kind,
        "seconds": decision.best.seconds,
        "ratio": decision.best.seconds / best,
        "everyone": everyone / decision.best.seconds if math.isfinite(everyone) else None,
        "gap": decision.gap,
        "proved": decision.proved,
        "planned": decision.tried,
        "cpu": spent,
    }


def summary(rows: Sequence[dict[str, Any]], without: int) -> str:
    """Returns the rows in words."""
    ratios, spent = [row["ratio"] for row in rows], [row["cpu"] for row in rows]
    everyone = [row["everyone"] for row in rows if row["everyone"]]
    dragged = [e for e in everyone if e > 1.02]
    worst = max(rows, key=lambda row: row["ratio"])
    return "\n".join(
        (
            f"{len(rows)} clusters ({without} more hold the model in no layout), {sum(r['subsets'] for r in rows)} "
            "subsets planned by brute force",
            f"seconds over the best subset's: worst {max(ratios):.4f}, mean {statistics.fmean(ratios):.4f} "
            f"(worst: {worst['hosts']} hosts, {worst['model']}, {worst['layout']})",
            f"all hosts would be worse by more than 2 % on {len(dragged)} of the {len(everyone)} clusters that hold "
            f"the model on all, by up to {max(dragged, default=1.0):.1f}x",
            f"processor seconds of a decision: mean {statistics.fmean(spent):.2f}, most {max(spent):.2f}; proved on "
            f"{sum(r['proved'] for r in rows)}, largest gap of the others "
            f"{max((r['gap'] for r in rows if not r['proved']), default=0.0):.1%}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    found = [measure(random_setting(rng)) for _ in range(args.clusters)]
    rows = [row for row in found if row]
    print(json.dumps(rows, indent=1) if args.json else summary(rows, len(found) - len(rows)))


if __name__ == "__main__":
    main()
