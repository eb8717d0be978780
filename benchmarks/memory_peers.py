"""One training run of `memory_limits.py` in one process per rank: Heteromesh, FSDP2 or DeepSpeed ZeRO-3.

Every system makes the same model on the meta device, takes the same weights from the same file and trains on the same
batches with the same loss. A peer's layout: whole sequences dealt to the ranks by cost in proportion to `--speeds`,
each rank's share in micro-batches of at most `--micro-tokens` (longer sequences are micro-batches of their own); all
ranks have as many of these, some a few tokens whose loss doesn't count. State is cut evenly, as both peers do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from safetensors import safe_open
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from training_peers import CLIP, IDLE_TOKENS, LEARNING_RATE, deal, run_rank, world_sum

import heteromesh as hm
from heteromesh.comm.world import World
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.planner.model.lengths import open_lengths
from heteromesh.planner.plan import Pass, Step
from heteromesh.runtime.process.memory import peak_bytes
from heteromesh.runtime.work.reader import IGNORED, PassInput, Reader
from heteromesh.runtime.work.sampler import Batch, Sampler
from llama import Llama, LlamaConfig

SEQUENCES = 200
VOCABULARY = 1024


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=("heteromesh", *PEERS), required=True)
    parser.add_argument("--weights", type=Path, help="safetensors that all begin with")
    parser.add_argument("--speeds", default="", help="peers: speed of each rank, comma-separated (default: equal)")
    parser.add_argument("--micro-tokens", type=int, default=0, help="peers: of a micro-batch; 0: all in one")
    parser.add_argument("--keep", action="store_true", help="fsdp2: layers stay gathered from forward to backward")
    parser.add_argument("--defer", action="store_true", help="fsdp2: gradients are summed once a step")
    parser.add_argument("--checkpoint", action="store_true", help="peers: layers are computed again in the backward")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lengths", default="lognormal:5.5,1.0,1024", help="as in `heteromesh plan`")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(words)


def make_model(chosen: argparse.Namespace) -> Llama:
    sizes = {"heads": 8, "kv_heads": 8, "intermediate": -(-chosen.hidden * 8 // 3 // 16) * 16}
    return Llama(LlamaConfig(vocab=VOCABULARY, layers=chosen.layers, hidden=chosen.hidden, **sizes))


def make_data(chosen: argparse.Namespace) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    lengths = islice(open_lengths(chosen.lengths).draw(), SEQUENCES)
    return [torch.randint(VOCABULARY, (max(2, n),), generator=source) for n in lengths]


class Peer:
    """A model under another framework. micro: of a loss, and whether it is the step's last."""

    def __init__(self, model: nn.Module, micro: Callable[[torch.Tensor, bool], None]) -> None:
        self.model, self.micro = model, micro


def fsdp2(chosen: argparse.Namespace) -> Peer:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model: Any = make_model(chosen)
    if chosen.checkpoint:
        model.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.layers)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not chosen.keep)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with safe_open(chosen.weights, "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            part = parameter.to_local()
            first = dist.get_rank() * -(-parameter.shape[0] // dist.get_world_size())
            part.copy_(file.get_slice(name.replace("_checkpoint_wrapped_module.", ""))[first : first + part.shape[0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def micro(loss: torch.Tensor, last: bool) -> None:
        if chosen.defer:
            model.set_requires_gradient_sync(last)
        loss.backward()
        if last:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return Peer(model, micro)


def zero3(chosen: argparse.Namespace) -> Peer:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 1e4},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model: Any = make_model(chosen)
    with safe_open(chosen.weights, "pt") as file:
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                if dist.get_rank() == 0:
                    parameter.copy_(file.get_tensor(name))
    if chosen.checkpoint:
        for layer in model.layers:
            layer.forward = _recomputed(layer.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def micro(loss: torch.Tensor, last: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss)
        engine.step()

    return Peer(engine, micro)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


PEERS = {"fsdp2": fsdp2, "zero3": zero3}


def micro_batches(lengths: Sequence[int], speeds: Sequence[float], chosen: argparse.Namespace) -> list[list[list[int]]]:
    """Returns by micro-batch and rank the places of its sequences in the batch."""
    found: list[list[list[int]]] = []
    for rank, share in enumerate(deal(lengths, speeds, chosen.hidden)):
        number, have = -1, 0
        for place in sorted(share, key=lambda i: -lengths[i]):
            if number < 0 or (chosen.micro_tokens and have + lengths[place] > chosen.micro_tokens):
                number, have = number + 1, 0
                if number == len(found):
                    found.append([[] for _ in speeds])
            found[number][rank].append(place)
            have += lengths[place]
    return found


def losses_of(
    peer: Peer, world: World, batch: Batch, speeds: Sequence[float], reader: Reader, chosen: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yields by micro-batch this rank's loss, times the ranks (peers average gradients), and whether it is the last."""
    shares = micro_batches(batch.lengths, speeds, chosen)
    inputs = [_input(share[world.rank], batch, world, reader) for share in shares]
    valid = world_sum(sum(item.valid for _, _, item in inputs))
    for number, (plan, lengths, item) in enumerate(inputs):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=chosen.precision == "bf16")
        # during the backward, too, for layers that are computed again
        with prepare_pass(plan, lengths, world, [1.0] * world.size).active():
            with autocast:
                logits = peer.model(item.tokens, item.positions)
            total = functional.cross_entropy(
                logits.flatten(0, 1).float(), item.labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            yield total * (world.size / valid if item.valid else 0.0), number == len(inputs) - 1


def _input(places: Sequence[int], batch: Batch, world: World, reader: Reader) -> tuple[Pass, list[int], PassInput]:
    plan = Pass(ranks=(world.rank,), method="local", sequences=(0,), shards=((IDLE_TOKENS,),), seconds=0.0)
    if not places:
        nothing = torch.zeros(1, IDLE_TOKENS, dtype=torch.int64)
        return plan, [IDLE_TOKENS], PassInput(nothing, nothing, nothing, 0)
    lengths = [batch.lengths[i] for i in places]
    plan = replace(plan, sequences=tuple(places), shards=(tuple(lengths),))
    step = Step(passes=(plan,), seconds=0.0, bound_seconds=0.0, gap=0.0, solve_seconds=0.0, batch=tuple(batch.lengths))
    return plan, lengths, reader.step_inputs(step, batch.sequences, world.rank)[0]


def run_peer(chosen: argparse.Namespace) -> dict[str, list[float]]:
    if chosen.system == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), exchange=dist.new_group())
    speeds = [float(x) for x in chosen.speeds.split(",")] if chosen.speeds else [1.0] * world.size
    peer, reader = PEERS[chosen.system](chosen), Reader(make_data(chosen))
    sampler = Sampler(reader.lengths, batch_tokens=chosen.batch_tokens, seed=0)
    result: dict[str, list[float]] = {"seconds": [], "losses": [], "tokens": []}
    dist.barrier()
    mark = time.perf_counter()
    for _ in range(chosen.steps):
        batch, total = sampler.next_batch(), 0.0
        for loss, last in losses_of(peer, world, batch, speeds, reader, chosen):
            peer.micro(loss, last)
            total += float(loss.detach())
        result["losses"].append(world_sum(total) / world.size)
        now = time.perf_counter()
        result["seconds"].append(now - mark)
        mark = now
        result["tokens"].append(sum(batch.lengths))
    peaks = [0.0] * world.size
    dist.all_gather_object(peaks, peak_bytes(torch.device("cpu")))
    dist.destroy_process_group()
    return result | {"peaks": peaks}


def run_ours(chosen: argparse.Namespace) -> dict[str, Any]:
    with torch.device("meta"):
        model = make_model(chosen)
    folder = chosen.output.with_suffix(".run")
    config = hm.TrainerConfig(
        batch_tokens=chosen.batch_tokens,
        max_steps=chosen.steps,
        run_dir=folder,
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP,
        precision=chosen.precision,
        print_plans=0,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    hm.Trainer(model, optimizer, make_data(chosen), config, weights=chosen.weights).fit()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [row["measured_seconds"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "peaks": [rank["measured"] for rank in json.loads((folder / "memory.json").read_text())["ranks"]],
    }


if __name__ == "__main__":
    settings = options()
    run_rank(settings, run_peer if settings.system in PEERS else run_ours)
