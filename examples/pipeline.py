"""Trains a small Llama in pipeline stages on real text: the cluster file's placement, or a cut of your own.

heteromesh run --nproc-per-node 4 --cluster cluster.toml examples/pipeline.py
heteromesh run --nproc-per-node 2 examples/pipeline.py --layers-per-stage 3,1
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn

import heteromesh as hm
from heteromesh.comm.world import World, join_world
from heteromesh.parallel.pipeline.engine import PipelineExecutor, PipelineResult
from heteromesh.parallel.pipeline.packs import pack_step
from heteromesh.planner.cost.analytic import analytic_costs
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.stages.hosts import cluster_sites
from heteromesh.planner.stages.placement import place
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.planner.stages.workload import workloads
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import open_tokens
from heteromesh.runtime.training.build import build_cluster, described_cluster
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama, LlamaConfig

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "heteromesh"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-stdlib", help="folder, .txt, .jsonl or .parquet")
    parser.add_argument("--max-length", type=int, default=2048, help="longest sequence, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--layers-per-stage", type=numbers, help="such as 3,1: ranks in order, equally many a stage (default: placed)"
    )
    parser.add_argument("--micro-batches", type=int, default=4, help="of a pipeline, with --layers-per-stage")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def settings(options: argparse.Namespace) -> hm.TrainerConfig:
    return hm.TrainerConfig(batch_tokens=options.batch_tokens, max_steps=options.steps, run_dir="unused")


def find_placement(options: argparse.Namespace, config: LlamaConfig, lengths: tuple[int, ...], ranks: int) -> Placement:
    """The user's cut, or what the planner makes of the cluster file of `heteromesh run`."""
    if options.layers_per_stage:
        layers = options.layers_per_stage
        if ranks % len(layers):
            raise hm.UserError(
                f"{len(layers)} stages on {ranks} ranks don't work out: start a multiple of {len(layers)} ranks"
            )
        each = ranks // len(layers)
        stages = (Stage(ranks=tuple(range(s * each, (s + 1) * each)), layers=n) for s, n in enumerate(layers))
        return Placement(stages=tuple(stages), micro_batches=(options.micro_batches,) * each)
    cluster = build_cluster(settings(options), ranks)
    spec = ModelSpec(
        name="example",
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.hidden // config.heads,
        intermediate=config.intermediate,
        vocab=config.vocab,
    )
    works = workloads(spec, analytic_costs(cluster, spec), lengths)
    return place(cluster_sites(cluster), works, tensor_parallel=[1]).placement


def describe(placement: Placement) -> str:
    parts = (f"{stage.layers} layers on ranks {', '.join(map(str, stage.ranks))}" for stage in placement.stages)
    return f"stages: {'; '.join(parts)}. Micro-batches: {', '.join(map(str, placement.micro_batches))}"


def line(step: int, placement: Placement, result: PipelineResult) -> str:
    bubbles = " ".join(f"{result.bubble(stage.ranks):.0%}" for stage in placement.stages)
    return f"step {step:>3}  loss {result.loss:.4f}  {result.seconds:.2f} s  bubble by stage {bubbles}"


def train(world: World, options: argparse.Namespace) -> None:
    store = open_tokens(
        open_corpus(options.data), load_tokenizer("bytes"), max_length=options.max_length, cache_dir=CACHE
    )
    reader = Reader(store)
    sampler = Sampler(reader.lengths, batch_tokens=options.batch_tokens, seed=0)
    batches = [sampler.next_batch() for _ in range(options.steps)]
    config = LlamaConfig(
        vocab=store.vocab_size, layers=options.layers, hidden=options.hidden, heads=4, kv_heads=2, intermediate=352
    )
    placement = world.once(lambda: find_placement(options, config, batches[0].lengths, world.size))
    torch.manual_seed(0)
    executor = PipelineExecutor(Llama(config), world, placement)
    optimizer = torch.optim.AdamW(executor.model.parameters(), lr=options.learning_rate)
    if world.rank == 0:
        print(describe(placement), flush=True)
    # packing is not perfect: room for twice the average micro-batch
    room = 2 * max(options.max_length, options.batch_tokens // sum(placement.micro_batches))
    for number, batch in enumerate(batches, 1):
        step = pack_step(batch.lengths, placement, room, pairs_per_token=1 / (6 * options.hidden))
        result = executor.run(step, reader.step_inputs(step, batch.sequences, executor.pipeline))
        norm = torch.tensor(executor.gradient_norm())
        nn.utils.clip_grads_with_norm_(executor.model.parameters(), 1.0, norm)
        optimizer.step()
        if world.rank == 0:
            print(line(number, placement, result), flush=True)
    executor.close()


def main() -> None:
    options = parse()
    # NCCL is told which ranks reach each other by RDMA
    with join_world(cluster=described_cluster(settings(options))) as world:
        train(world, options)


if __name__ == "__main__":
    main()
