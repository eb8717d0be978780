"""The plan against the static even layouts, on the demo's data, model and machine.

    python benchmarks/even_split.py [--ranks 2] [--batches 8] [--repeats 3] [--max-length 16384] [--json]

Every batch runs (forward, backward, gradient sum; no update) under each layout, in turns, `repeats` times; a batch's
ratio is that of the medians. One process per core: more would hide imbalance.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from heteromesh.comm.world import World, join_world
from heteromesh.planner.cluster.cluster import local_cluster
from heteromesh.planner.sequences.step import plan_step
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import open_tokens
from heteromesh.runtime.engine.baselines import EvenSplit, compare
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.training.build import build_costs
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama, LlamaConfig


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=24576)
    parser.add_argument("--max-length", type=int, default=16384)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(world: World, chosen: argparse.Namespace) -> tuple[EvenSplit, ...]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "heteromesh"
    store = open_tokens(open_corpus(), load_tokenizer(), max_length=chosen.max_length, cache_dir=cache)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=store.vocab_size, layers=2, hidden=128, heads=4, kv_heads=2, intermediate=352))
    executor, reader = StepExecutor(model, world), Reader(store)
    config = TrainerConfig(batch_tokens=chosen.batch_tokens, max_steps=1, run_dir="unused")
    costs = build_costs(config, local_cluster(world.size), executor, reader)
    sampler = Sampler(reader.lengths, batch_tokens=chosen.batch_tokens, seed=0)
    batches = [sampler.next_batch() for _ in range(chosen.batches)]
    planned = [(batch, plan_step(batch.lengths, costs, time_limit=0.05)) for batch in batches]
    return compare(executor, reader, world.once(lambda: planned), costs, repeats=chosen.repeats)


def show(results: tuple[EvenSplit, ...], chosen: argparse.Namespace) -> None:
    for result in results:
        quartiles = statistics.quantiles(result.ratios, n=4)
        if chosen.json:
            print(json.dumps({"layout": result.layout, "ratio": result.ratio, "ratios": result.ratios}))
        else:
            print(result.line())
            print(f"  batches: median {quartiles[1]:.3f}x, quartiles {quartiles[0]:.3f}x to {quartiles[2]:.3f}x")


def main() -> int:
    chosen = options()
    if "RANK" not in os.environ:
        command = ["-m", "heteromesh", "run", "--nproc-per-node", str(chosen.ranks), __file__, *sys.argv[1:]]
        return subprocess.run([sys.executable, *command]).returncode
    with join_world() as world:
        results = measure(world, chosen)
        if world.rank == 0:
            show(results, chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
