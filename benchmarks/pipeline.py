"""Cuts of a model over two pipeline stages on unequal hosts: every cut of the layers, and data parallel instead.

    python benchmarks/pipeline.py [--layers 6] [--speed 0.5] [--repeats 5] [--json]

Two hosts in the sandbox (root), 1 Gbit/s, with CPU quotas of 1 core and `--speed` cores that add up to less than the
machine's. All layouts run the same batches of natural lengths in turns, forward, backward and gradient sum; a layout's
seconds are the median over batches and repeats of the slower rank's. Losses must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from heteromesh.comm.world import World, join_world
from heteromesh.parallel.pipeline.engine import PipelineExecutor, PipelineResult
from heteromesh.parallel.pipeline.packs import pack_step
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import open_tokens
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Batch, Sampler
from llama import Llama, LlamaConfig

CLUSTER = """
name = "two-speeds"
[devices.fast]
tflops = 1
memory_gb = 4
memory_gbps = 10
link_gbps = 5
[devices.slow]
tflops = {speed}
memory_gb = 4
memory_gbps = 10
link_gbps = 5
[[hosts]]
names = ["fast0"]
device = "fast"
count = 1
nics = [{{ kind = "ethernet", gbit = 1 }}]
[[hosts]]
names = ["slow0"]
device = "slow"
count = 1
nics = [{{ kind = "ethernet", gbit = 1 }}]
"""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--speed", type=float, default=0.5, help="of the second host, relative to the first")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--max-length", type=int, default=768)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def layouts(chosen: argparse.Namespace) -> dict[str, Placement]:
    """Every cut, and each micro-batch whole on one rank, evenly and in proportion to speed."""
    count, total = chosen.micro_batches, chosen.layers
    found = {}
    for first in range(1, total):
        stages = (Stage(ranks=(0,), layers=first), Stage(ranks=(1,), layers=total - first))
        found[f"stages {first} + {total - first}"] = Placement(stages=stages, micro_batches=(count,))
    fast = round(count / (1 + chosen.speed))
    for part in dict.fromkeys(((count + 1) // 2, fast)):
        whole = (Stage(ranks=(0, 1), layers=total),)
        name = f"replicas, {part} + {count - part} micro-batches"
        found[name] = Placement(stages=whole, micro_batches=(part, count - part))
    return found


def measure(world: World, chosen: argparse.Namespace) -> dict[str, list[PipelineResult]]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "heteromesh"
    store = open_tokens(open_corpus(), load_tokenizer(), max_length=chosen.max_length, cache_dir=cache)
    reader = Reader(store)
    sampler = Sampler(reader.lengths, batch_tokens=chosen.batch_tokens, seed=0)
    batches = [sampler.next_batch() for _ in range(chosen.batches)]
    torch.manual_seed(0)
    intermediate = -(-chosen.hidden * 8 // 3 // 16) * 16
    model = Llama(
        LlamaConfig(
            vocab=store.vocab_size,
            layers=chosen.layers,
            hidden=chosen.hidden,
            heads=4,
            kv_heads=2,
            intermediate=intermediate,
        )
    )
    results: dict[str, list[PipelineResult]] = {}
    for turn in range(chosen.repeats + 1):
        for name, placement in layouts(chosen).items():
            executor = PipelineExecutor(model, world, placement)
            for batch in batches[: 1 if turn == 0 else None]:
                result = run(executor, placement, batch, reader, chosen)
                if turn:  # the first turn warms up
                    results.setdefault(name, []).append(result)
            executor.close()
    return results


def run(
    executor: PipelineExecutor, placement: Placement, batch: Batch, reader: Reader, chosen: argparse.Namespace
) -> PipelineResult:
    room = 2 * max(chosen.max_length, chosen.batch_tokens // chosen.micro_batches)
    step = pack_step(batch.lengths, placement, room, pairs_per_token=1 / (6 * chosen.hidden))
    inputs = reader.step_inputs(step, batch.sequences, executor.pipeline)
    executor.world.barrier()
    return executor.run(step, inputs)


def show(results: dict[str, list[PipelineResult]], chosen: argparse.Namespace) -> None:
    losses = next(iter(results.values()))
    for own in results.values():
        for result, other in zip(own, losses, strict=True):
            assert abs(result.loss - other.loss) < 1e-5 * other.loss, "layouts differ in their loss"
    equal = statistics.median(r.seconds for r in results[f"stages {chosen.layers // 2} + {-(-chosen.layers // 2)}"])
    for name, own in results.items():
        seconds = [r.seconds for r in own]
        middle = statistics.median(seconds)
        bubbles = [statistics.median(r.bubble([rank]) for r in own) for rank in range(2)]
        if chosen.json:
            print(json.dumps({"layout": name, "seconds": seconds, "bubble": bubbles}), flush=True)
            continue
        low, _, high = statistics.quantiles(seconds, n=4)
        print(
            f"{name:34} {middle:6.3f} s ({low:.3f} to {high:.3f})  {equal / middle:5.2f}x the equal cut  "
            f"bubble {bubbles[0]:4.0%} {bubbles[1]:4.0%}",
            flush=True,
        )


def main() -> int:
    chosen = options()
    if "RANK" not in os.environ:
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(CLUSTER.format(speed=chosen.speed))
            file.flush()
            own = ["-m", "heteromesh", "sandbox", file.name, "--raw", "--cores", str(1 + chosen.speed), "--"]
            return subprocess.run([sys.executable, *own, "heteromesh", "run", __file__, *sys.argv[1:]]).returncode
    with join_world() as world:
        results = measure(world, chosen)
        if world.rank == 0:
            show(results, chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
