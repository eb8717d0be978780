"""One training run of `cluster_training.py` in one process per rank: Heteromesh, or a peer under its own static layout.

Every system trains the same model from the same weights on the same batches, computes attention with the same kernels
(sequences of a rank concatenated, never attending to each other) and divides by the global number of valid tokens.

A peer's layout: blocks of `--degree` ranks. A sequence is dealt whole to a block (longest first, to where it ends
soonest by `--speeds`), whose ranks split it evenly; the splitting is ours (method gather), as DDP has none. A block
without a sequence runs a few tokens whose loss doesn't count, so that its ranks join in the collectives.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import heteromesh as hm
from heteromesh.comm.world import World
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.planner.model.lengths import open_lengths
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.static import even_shards
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import open_tokens
from heteromesh.runtime.work.reader import IGNORED, PassInput, Reader, Sequences
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama, LlamaConfig

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heteromesh"
LEARNING_RATE, CLIP = 1e-3, 1.0
SEQUENCES = 1000
"""Drawn from the lengths' distribution; more than any run here needs."""
IDLE_TOKENS = 16
"""Of a rank without a sequence, in each of its steps."""


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=("heteromesh", "heteromesh-sharded", *PEERS), required=True)
    parser.add_argument("--speeds", default="", help="peers: speed of each rank, comma-separated (default: equal)")
    parser.add_argument("--degree", type=int, default=1, help="peers: ranks that split a sequence")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="of gradient buckets; fsdp2: 0 wraps no layers")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--lengths", default="", help="as in `heteromesh plan`; default: the documents' own")
    parser.add_argument("--max-length", type=int, default=2048, help="longer documents are cut")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(words)


def open_data(chosen: argparse.Namespace) -> tuple[Sequences, int]:
    """(sequences, size of the vocabulary): Python's own sources, with `--lengths` end to end and cut to these."""
    store = open_tokens(open_corpus(), load_tokenizer(), max_length=chosen.max_length, cache_dir=CACHE)
    if not chosen.lengths:
        return store, store.vocab_size
    ends = np.cumsum(list(islice(open_lengths(chosen.lengths).draw(), SEQUENCES)))
    parts, have = [], 0
    for document in map(store.sequence, range(len(store))):
        parts.append(document)
        have += len(document)
        if have >= ends[-1]:
            break
    return [part.copy() for part in np.split(np.concatenate(parts), ends)[:-1] if len(part) > 1], store.vocab_size


def make_model(chosen: argparse.Namespace, vocab: int) -> Llama:
    torch.manual_seed(0)
    sizes = {"heads": 8, "kv_heads": 2, "intermediate": -(-chosen.hidden * 8 // 3 // 16) * 16}
    return Llama(LlamaConfig(vocab=vocab, layers=chosen.layers, hidden=chosen.hidden, **sizes))


def deal(lengths: Sequence[int], speeds: Sequence[float], hidden: int) -> list[list[int]]:
    """Sequences to blocks: the longest first, each to where it ends soonest (static shares in proportion to speed)."""
    load, shares = [0.0] * len(speeds), [[] for _ in speeds]
    cost = [n * (12 * hidden + n) for n in lengths]
    for i in sorted(range(len(lengths)), key=lambda i: -cost[i]):
        target = min(range(len(speeds)), key=lambda b: (load[b] + cost[i]) / speeds[b])
        load[target] += cost[i]
        shares[target].append(i)
    return shares


def static_step(lengths: Sequence[int], speeds: Sequence[float], chosen: argparse.Namespace) -> Step:
    """One pass for each block that has sequences."""
    blocks = [range(first, first + chosen.degree) for first in range(0, len(speeds), chosen.degree)]
    power = [min(speeds[r] for r in block) for block in blocks]
    passes = tuple(
        Pass(
            ranks=tuple(block),
            method="gather" if chosen.degree > 1 else "local",
            sequences=tuple(share),
            shards=even_shards([lengths[i] for i in share], len(block)),
            seconds=0.0,
        )
        for block, share in zip(blocks, deal(lengths, power, chosen.hidden), strict=True)
        if share
    )
    return Step(passes=passes, seconds=0.0, bound_seconds=0.0, gap=0.0, solve_seconds=0.0, batch=tuple(lengths))


def loss_of(model: nn.Module, world: World, step: Step, reader: Reader, sequences: Sequence[int]) -> torch.Tensor:
    """This rank's part of the loss, times the ranks (peers average gradients); differentiable."""
    mine = step.passes_of(world.rank)
    if mine:
        position, plan = mine[0]
        item, lengths = (
            reader.step_inputs(step, sequences, world.rank)[position],
            [step.batch[i] for i in plan.sequences],
        )
    else:
        plan = Pass(ranks=(world.rank,), method="local", sequences=(0,), shards=((IDLE_TOKENS,),), seconds=0.0)
        nothing = torch.zeros(1, IDLE_TOKENS, dtype=torch.int64)
        item, lengths = PassInput(nothing, nothing, nothing, 0), [IDLE_TOKENS]
    valid = world_sum(item.valid)
    with prepare_pass(plan, lengths, world, [1.0] * world.size).active():
        logits = model(item.tokens, item.positions)
        parts = functional.cross_entropy(
            logits.flatten(0, 1), item.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return parts * (world.size / valid if item.valid else 0.0)


def world_sum(value: float) -> float:
    total = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


class Peer:
    """A model wrapped by another framework: how it steps."""

    def __init__(self, model: nn.Module, update: Callable[[torch.Tensor], None]) -> None:
        self.model, self.update = model, update


def ddp(model: nn.Module, chosen: argparse.Namespace) -> Peer:
    wrapped = nn.parallel.DistributedDataParallel(
        model, bucket_cap_mb=chosen.bucket_mb, gradient_as_bucket_view=True, static_graph=True
    )
    return Peer(wrapped, _torch_update(wrapped))


def fsdp2(model: nn.Module, chosen: argparse.Namespace) -> Peer:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers if chosen.bucket_mb else ():
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return Peer(model, _torch_update(model))


def zero1(model: nn.Module, chosen: argparse.Namespace) -> Peer:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": int(chosen.bucket_mb * 2**20 / 4)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def update(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return Peer(engine, update)


def _torch_update(model: nn.Module) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return update


PEERS = {"ddp": ddp, "fsdp2": fsdp2, "zero1": zero1}


def run_peer(chosen: argparse.Namespace) -> dict[str, list[float]]:
    """One a step: seconds, losses, tokens."""
    if chosen.system == "zero1":
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    data, vocab = open_data(chosen)
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), exchange=dist.new_group())
    speeds = [float(x) for x in chosen.speeds.split(",")] if chosen.speeds else [1.0] * world.size
    peer = PEERS[chosen.system](make_model(chosen, vocab), chosen)
    reader = Reader(data)
    sampler = Sampler(reader.lengths, batch_tokens=chosen.batch_tokens, seed=0)
    seconds, losses, tokens = [], [], []
    dist.barrier()
    mark = time.perf_counter()
    for _ in range(chosen.steps):
        batch = sampler.next_batch()
        step = static_step(batch.lengths, speeds, chosen)
        loss = loss_of(peer.model, world, step, reader, batch.sequences)
        peer.update(loss)
        losses.append(world_sum(float(loss.detach())) / world.size)
        now = time.perf_counter()
        seconds.append(now - mark)
        mark = now
        tokens.append(sum(batch.lengths))
    dist.destroy_process_group()
    return {"seconds": seconds, "losses": losses, "tokens": tokens}


def run_ours(chosen: argparse.Namespace) -> dict[str, list[float]]:
    data, vocab = open_data(chosen)
    model = make_model(chosen, vocab)
    folder = chosen.output.with_suffix(".run")
    config = hm.TrainerConfig(
        batch_tokens=chosen.batch_tokens,
        max_steps=chosen.steps,
        run_dir=folder,
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP,
        print_plans=0,
        shard_optimizer=chosen.system == "heteromesh-sharded",
    )
    hm.Trainer(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), data, config).fit()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [json.loads(line)["measured"] for line in (folder / "plan.jsonl").read_text().splitlines()]
    return {
        "seconds": [row["measured_seconds"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "predicted": [row["predicted_seconds"] for row in rows],
        "exposed": [row["exposed_comm_seconds"] + waited(took) for row, took in zip(rows, measured, strict=True)],
    }


def waited(measured: dict[str, Any]) -> float:
    """Seconds that the rank which waited longest in its passes waited for their exchanges."""
    spent = [0.0] * len(measured["busy_seconds"])
    for part in measured["passes"]:
        spent[part["rank"]] += part["seconds"]
    return max(all_of - busy for all_of, busy in zip(spent, measured["busy_seconds"], strict=True))


def run_rank(chosen: argparse.Namespace, run: Callable[[argparse.Namespace], Any]) -> None:
    """Runs one rank on one thread; the first writes what came of it."""
    torch.set_num_threads(1)
    result = run(chosen)
    if int(os.environ.get("RANK", "0")) == 0:
        chosen.output.write_text(json.dumps(result))


if __name__ == "__main__":
    settings = options()
    run_rank(settings, run_peer if settings.system in PEERS else run_ours)
