"""How good steps are on 64 devices with FlexSP's published constants: beside references, bound and two peers.

    python benchmarks/planner.py [--batches 10] [--lengths examples/lengths/wikipedia.json] [--json]

Batches of 512 sequences, longer than the limit drawn again: Wikipedia (inverse CDF of a quantile table) and lognormal
surrogates of CommonCrawl (mu 7.2, sigma 1.5) and GitHub (7.0, 1.75). Columns: seconds of our step; over the lock-step
fluid reference (sum over sequences of their cheapest degree * seconds over devices, plus ceil(tokens / capacity) times
the fixed cost of a pass; degrees are powers of two); over our lower bound; processor milliseconds to plan; the peers'
steps over ours.
Every step is checked. The last rows: half of the devices have half the speed and half the memory.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.report.check import check_step
from heteromesh.planner.sequences.step import plan_step
from schedulers import Peers

RANKS, SEQUENCES = 64, 512
GIGABYTES = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
"""All-to-all rates as published; their gigabyte is 1000 * 2^20 bytes."""
LIMITS = {192: 7.117, 384: 7.850}
"""Longest sequence in Ki tokens: parameters in billions (the position table grows with the limit)."""
SETS = {"wikipedia": None, "commoncrawl-like": (7.2, 1.5), "github-like": (7.0, 1.75)}


def flexsp_costs(limit: int, unequal: bool = False) -> Costs:
    """GPT-7B on A100-40GB (arXiv 2412.01523, its solver's constants)."""
    # 30 GB a device; 16 bytes a parameter over all devices (ZeRO-3); 4.4804 MB of activations a token.
    room = int((30 * 1024 - LIMITS[limit] * 16 * 1024 / RANKS) / 4.4804)
    slow = RANKS // 2 if unequal else 0
    return Costs(
        seconds_per_token2=5.128e-9,
        seconds_per_token=1.839576e-4,
        seconds_per_pass=0.62936,
        speeds=(1.0,) * (RANKS - slow) + (0.5,) * slow,
        capacity=(room,) * (RANKS - slow) + (room // 2,) * slow,
        methods=(Method(name="ulysses", bytes_per_token=16 * 32 * 4096),),
        rate=RateByDegree({d: v * 1000 * 2**20 for d, v in GIGABYTES.items()}),
        hosts=tuple(r // 8 for r in range(RANKS)),
    )


def batches(name: str, table: Path, most: int, count: int, seed: int) -> Iterator[list[int]]:
    """Batches of a set; sequences longer than `most` are drawn again."""
    rng = np.random.default_rng(seed)
    shape = SETS[name]
    quantiles = json.loads(table.read_text()) if shape is None else {}
    for _ in range(count):
        batch: list[int] = []
        while len(batch) < SEQUENCES:
            if shape is None:
                draw = np.interp(rng.uniform(0, 100, SEQUENCES), quantiles["percentile"], quantiles["length"])
            else:
                draw = rng.lognormal(*shape, SEQUENCES)
            batch += [int(n) for n in draw if 1 <= n <= most]
        yield batch[:SEQUENCES]


def fluid_reference(batch: Sequence[int], costs: Costs) -> float:
    """Lock-step seconds without packing or balance loss, degrees powers of two."""
    peers, room = Peers(costs), costs.capacity[0]
    least = sum(min(d * peers.seconds(n, d) for d in peers.degrees if n <= d * room) for n in batch)
    return least / RANKS + math.ceil(sum(batch) / (room * RANKS)) * costs.seconds_per_pass


def measure(name: str, limit: int, table: Path, count: int, seed: int, unequal: bool) -> dict[str, Any]:
    """One row."""
    costs = flexsp_costs(limit, unequal)
    most = min(limit * 1024, sum(costs.capacity))
    rows: dict[str, list[float]] = {}
    plan_step([1000], costs)  # loads the solver, which would count for the first batch
    for batch in batches(name, table, most, count, seed):
        began = time.process_time()
        step = plan_step(batch, costs)
        spent = time.process_time() - began
        check_step(step, costs)
        row = {"seconds": step.seconds, "bound": step.seconds / step.bound_seconds, "milliseconds": 1000 * spent}
        if not unequal:
            peers = Peers(costs)
            row["reference"] = step.seconds / fluid_reference(batch, costs)
            row["flexsp"] = peers.flexsp(batch) / step.seconds
            row["megatron"] = peers.megatron(batch) / step.seconds
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
    result: dict[str, Any] = {"set": name, "limit": limit, "unequal": unequal, "batches": count}
    result |= {key: statistics.fmean(values) for key, values in rows.items()}
    return result | {"milliseconds_max": max(rows["milliseconds"])}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned table."""
    head = f"{'set':<18}{'limit':>6}{'step s':>9}{'/reference':>12}{'/bound':>8}{'ms':>6}{'max ms':>8}"
    lines = [head + f"{'FlexSP-like/ours':>18}{'Megatron-like/ours':>20}"]
    for row in rows:
        name = row["set"] + (" *" if row["unequal"] else "")
        line = f"{name:<18}{row['limit']:>5}K{row['seconds']:>9.3f}"
        line += f"{row['reference']:>12.4f}" if "reference" in row else f"{'-':>12}"
        line += f"{row['bound']:>8.4f}{row['milliseconds']:>6.0f}{row['milliseconds_max']:>8.0f}"
        for key, width in (("flexsp", 18), ("megatron", 20)):
            line += f"{row[key]:>{width}.3f}" if key in row else f"{'-':>{width}}"
        lines.append(line)
    return "\n".join([*lines, "* half of the devices at half speed and half memory"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--lengths", type=Path, default=root / "examples/lengths/wikipedia.json")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    if not args.lengths.is_file():
        sys.exit(f"length table {args.lengths} does not exist: give one with --lengths")
    cases = [(name, limit, False) for limit in LIMITS for name in SETS] + [(name, 192, True) for name in SETS]
    rows = [measure(name, limit, args.lengths, args.batches, args.seed, unequal) for name, limit, unequal in cases]
    print(json.dumps(rows, indent=1) if args.json else show(rows))


if __name__ == "__main__":
    main()
