"""Predicted against measured step seconds in the sandbox, over layouts that differ in degrees, methods and lengths.

    sudo python benchmarks/prediction.py [--cluster examples/clusters/sandbox-unequal.toml] [--repeats 5] [--json]
    sudo python benchmarks/prediction.py --probe-only F; sudo python benchmarks/prediction.py --measured F   # in two

`heteromesh probe` measures the cluster and a small decoder once; nothing else is calibrated. Then every layout runs
(forward, backward, gradient sum; no update) `repeats` times in turns, and the median is set beside the prediction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import torch

from heteromesh.comm.world import World, join_world
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.cost.measured import measured_costs
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.cost.shards import costed
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.sequences.timeline import starts, timed_step
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from llama import Llama, LlamaConfig

SHAPE = LlamaConfig(vocab=258, layers=2, hidden=128, heads=4, kv_heads=2, intermediate=352)
MODEL = """num_hidden_layers = 2
hidden_size = 128
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 352
vocab_size = 258
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout. Passes: the end of the last rank's passes; the rest of a step is the exposed gradient sum."""

    layout: str
    predicted: float
    measured: float
    predicted_passes: float
    measured_passes: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


Piece = tuple[tuple[int, ...], str, int, bool]
"""Ranks, method, tokens of one sequence, and whether its shards follow the ranks' speeds (else they are even)."""


def hand_made(costs: Costs) -> dict[str, list[Piece]]:
    """Layouts of passes with one sequence each."""
    by_speed = [(4 * int(900 * v), r) for r, v in enumerate(costs.speeds)]
    everyone = (0, 1, 2, 3)
    layouts: dict[str, list[Piece]] = {
        "one pass a rank, equal tokens": [((r,), "local", 2048, False) for r in everyone],
        "one pass a rank, tokens by speed": [((r,), "local", n, False) for n, r in by_speed],
        "three passes a rank, tokens by speed": [((r,), "local", n // 3, False) for _ in range(3) for n, r in by_speed],
        "fast pair and slow pair, gather": [((0, 1), "gather", 4096, False), ((2, 3), "gather", 2048, False)],
        "mixed pairs, ulysses, by speed": [((0, 2), "ulysses", 3072, True), ((1, 3), "ulysses", 3072, True)],
        "fast pair splits, slow ones alone": [
            ((0, 1), "ulysses", 4096, False),
            ((2,), "local", 1024, False),
            ((3,), "local", 1024, False),
        ],
    }
    for method in costs.methods:
        if method.fits(4):
            layouts[f"all ranks, {method.name}, even"] = [(everyone, method.name, 6144, False)]
    layouts["all ranks, ulysses, by speed"] = [(everyone, "ulysses", 6144, True)]
    return layouts


def built(pieces: Sequence[Piece], costs: Costs) -> Step:
    """The layout as a step."""
    passes: list[Pass] = []
    for k, (ranks, method, length, by_speed) in enumerate(pieces):
        weights = [costs.speeds[r] if by_speed else 1.0 for r in ranks]
        edges = [round(length * sum(weights[:i]) / sum(weights)) for i in range(len(ranks) + 1)]
        shards = tuple((b - a,) for a, b in itertools.pairwise(edges))
        chosen = costs.method(method) if len(ranks) > 1 else None
        passes.append(costed(ranks, chosen, (k,), shards, [length], costs))
    return timed_step(passes, tuple(n for _, _, n, _ in pieces), costs, 0.0, time.perf_counter())


def planned(costs: Costs) -> dict[str, Step]:
    """What the planner makes of three batches."""
    draw = random.Random(0)
    spread = [min(4096, max(16, int(draw.lognormvariate(5.5, 1.0)))) for _ in range(32)]
    batches = {"32 of all lengths": spread, "one of 8192 and 24 of 256": [8192] + [256] * 24, "two of 4096": [4096] * 2}
    return {f"planned, {name}": plan_step(lengths, costs, time_limit=0.2) for name, lengths in batches.items()}


def measure(world: World, cluster: Path, repeats: int) -> list[Row]:
    """Every layout in turns, `repeats` times after one to warm up; step: the slowest rank's."""
    costs = measured_costs(load_cluster(cluster))
    assert costs, "the cluster file has no measured constants"
    executor = StepExecutor(Llama(SHAPE), world, speeds=costs.speeds)
    steps = {name: built(pieces, costs) for name, pieces in hand_made(costs).items()}
    steps |= world.once(lambda: planned(costs))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            reader = Reader([torch.arange(n) % SHAPE.vocab for n in step.batch])
            inputs = reader.step_inputs(step, range(len(step.batch)), world.rank)
            world.barrier()
            start = time.perf_counter()
            result = executor.run(step, inputs, valid_tokens=sum(step.batch))
            seconds = max(world.gather(time.perf_counter() - start))
            ends = [sum(p.seconds for p in result.passes if p.rank == rank) for rank in range(world.size)]
            if turn:
                times[name].append((seconds, max(ends)))
    executor.close()
    return [
        Row(
            layout=name,
            predicted=step.seconds,
            measured=statistics.median(s for s, _ in times[name]),
            predicted_passes=max(starts(step.passes, world.size)[1]),
            measured_passes=statistics.median(e for _, e in times[name]),
        )
        for name, step in steps.items()
    ]


def show(rows: Sequence[Row], as_json: bool) -> None:
    errors = sorted(abs(row.error) for row in rows)
    if as_json:
        print(json.dumps({"median_error": statistics.median(errors), "rows": [asdict(row) for row in rows]}))
        return
    print("| layout | predicted s | measured s | error | passes: predicted s | measured s |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.predicted_passes, row.measured_passes)
        print(f"| {row.layout} | {row.predicted:.3f} | {row.measured:.3f} | {row.error:+.1%} |", end="")
        print("".join(f" {value:.3f} |" for value in cells))
    print(f"\n{len(rows)} layouts: absolute error median {statistics.median(errors):.1%}, largest {errors[-1]:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", type=Path, default=ROOT / "examples/clusters/sandbox-unequal.toml")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--probe-only", type=Path, metavar="FILE", help="measure the cluster into FILE, and no more")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="what --probe-only wrote, instead of measuring")
    parser.add_argument("--on-host", action="store_true", help=argparse.SUPPRESS)  # set where it runs on the hosts
    options = parser.parse_args()
    if options.on_host:
        with join_world() as world:
            rows = measure(world, options.measured, options.repeats)
            if world.rank == 0:
                show(rows, options.json)
        return 0
    sandbox = [sys.executable, "-m", "heteromesh", "sandbox", "--raw", str(options.cluster), "--", "heteromesh"]
    with tempfile.TemporaryDirectory() as folder:
        file = options.measured or options.probe_only or Path(folder) / "measured.toml"
        if not options.measured:
            model = Path(folder) / "small.toml"
            model.write_text(MODEL)
            words = ["probe", "-o", str(file), "--model", str(model), "--cluster", str(options.cluster)]
            status = subprocess.run([*sandbox, *words], stdout=subprocess.DEVNULL if options.json else None).returncode
            if status or options.probe_only:
                return status
        flags = ["--measured", str(file), "--repeats", str(options.repeats), *(["--json"] if options.json else [])]
        return subprocess.run([*sandbox, "run", __file__, "--on-host", *flags]).returncode


if __name__ == "__main__":
    raise SystemExit(main())
