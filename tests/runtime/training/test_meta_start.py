"""Models that begin without memory: the same numbers as one process, and no rank that ever has all weights."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate
import pytest
import torch
import torch.nn.functional as functional
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as TransformersConfig

import heteromesh as hm
from heteromesh.parallel.initial.weights import InitialWeights
from heteromesh.parallel.state.sharded_weights import ShardedWeights
from heteromesh.parallel.transformers import register
from heteromesh.runtime.training.fixed import FixedJob
from heteromesh.runtime.training.modes import layer_by_layer, whole_model
from llama import Llama, LlamaConfig
from owners import collectives_of
from ranks import World, run_ranks
from steps import TINY
from tiny_models import SIZES
from trainers import DATA, gather_costs

STEPS, RESUMED, ELSEWHERE = 3, 4, 5
"""The last steps on two ranks, then on three, then of one process."""
FRACTIONS = (0.3, 0.1)
"""Of the first ranks; what is left over is the last one's."""


def tied() -> nn.Module:
    with accelerate.init_empty_weights():
        model = Llama(TINY)
    model.head.weight = model.embed.weight
    return model


def transformers_model(**changes: Any) -> Any:
    register()
    config = TransformersConfig(**{**SIZES, "tie_word_embeddings": True, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="heteromesh")


def from_transformers() -> nn.Module:
    with accelerate.init_empty_weights():
        model = transformers_model()
    model.tie_weights()
    return model


def with_adapters() -> nn.Module:
    return get_peft_model(from_transformers(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


KINDS: Mapping[str, tuple[Callable[[], nn.Module], bool]] = {
    "initialised, tied": (tied, False),
    "Transformers, initialised": (from_transformers, False),
    "Transformers, bf16 files": (from_transformers, True),
    "LoRA on files": (with_adapters, True),
}
"""How a model is built, and whether its weights are in files."""


class HeldOut(hm.Hook):
    """The loss of a sequence; ranks call the model differently often, and exchange something."""

    evaluate_every = 2

    def evaluate(self, step: int, model: nn.Module, world: World) -> Mapping[str, float]:
        tokens = torch.arange(40)[None] * 7 % 50
        for _ in range(1 + world.rank):
            given = model(tokens, position_ids=torch.arange(40)[None])
            logits = given if isinstance(given, torch.Tensor) else given.logits
        loss = functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
        return {"held_out": float(world.sum(loss.double()[None])[0]) / world.size}


def trainer_of(kind: str, folder: Path, **changes: Any) -> hm.Trainer:
    build, in_files = KINDS[kind]
    model = build()
    trained = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {
        "batch_tokens": 220, "run_dir": folder / kind, "plan_seconds": 0.02, "seed": 5, "print_plans": 0,
        "max_steps": STEPS, "cost": folder / "cost.toml", "idle_hosts": False,
    }  # fmt: skip
    data = [[(7 * i + 3 * k * k) % 50 for k in range(len(s))] for i, s in enumerate(DATA)]
    return hm.Trainer(
        model,
        torch.optim.AdamW(trained, lr=1e-3, eps=1e-3),
        data,
        hm.TrainerConfig(**(options | changes)),
        hooks=[HeldOut()],
        weights=folder / "weights" if in_files else None,
    )


def write_files(folder: Path) -> None:
    """Weights in bf16, in several files."""
    torch.manual_seed(1)
    transformers_model().to(torch.bfloat16).save_pretrained(folder / "weights", max_shard_size="20KB")
    assert (folder / "weights" / "model.safetensors.index.json").exists()
    (folder / "cost.toml").write_text(gather_costs(128))


def sharded(world: World, folder: Path, changes: dict[str, Any]) -> list[tuple[tuple[float, ...], int]]:
    """By kind, the losses and the most elements that a layer's parameter has in the end. Ranks own unequal parts."""
    found = []
    for kind in KINDS:
        trainer = trainer_of(kind, folder, shard_weights=True, **changes)
        with patch.object(whole_model, "build_collectives", lambda *given: collectives_of(given[3], FRACTIONS)):
            losses = trainer.fit().losses
        inner = [p.numel() for n, p in trainer.model.named_parameters() if ".layers." in f".{n}"]
        found.append((losses, max(inner)))
    return found


def evaluations(folder: Path) -> list[float]:
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["held_out"] for line in lines]


def test_it_is_one_process_and_checkpoints_are_everybodys(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
        write_files(folder)
    reference = {kind: trainer_of(kind, alone, max_steps=ELSEWHERE) for kind in KINDS}
    expected = {kind: trainer.fit().losses for kind, trainer in reference.items()}
    two = run_ranks(2, sharded, together, {})
    three = run_ranks(3, sharded, together, {"resume": True, "max_steps": RESUMED})
    for results, first in ((two, 0), (three, STEPS)):
        for rows in results:
            for kind, (losses, largest) in zip(KINDS, rows, strict=True):
                assert losses == pytest.approx(expected[kind][first : first + len(losses)], rel=1e-6), kind
                assert largest == 0, "nobody has layers' weights afterwards"
    for kind in KINDS:
        last = trainer_of(kind, together, resume=True, max_steps=ELSEWHERE)
        assert last.fit().losses == pytest.approx(expected[kind][RESUMED:], rel=1e-6), kind
        pairs = zip(last.model.parameters(), reference[kind].model.parameters(), strict=True)
        assert max(float((mine - other).abs().max()) for mine, other in pairs) < 1e-6, kind
        assert evaluations(together / kind) == pytest.approx(evaluations(alone / kind), rel=1e-6), kind
    assert expected["Transformers, initialised"] != expected["Transformers, bf16 files"]


M_MMAP_THRESHOLD = -3
LARGE = LlamaConfig(vocab=64, layers=16, hidden=512, heads=8, kv_heads=8, intermediate=1024)


def held_at_start(world: World, folder: Path) -> tuple[float, float, float]:
    """The most bytes that were held from the start to the first step, beside what the process had; this rank's part,
    and all weights."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system
    begun(world, folder / "tiny", TINY)  # what is imported on the way is no weights
    return begun(world, folder / "large", LARGE)


def begun(world: World, folder: Path, sizes: LlamaConfig) -> tuple[float, float, float]:
    with torch.device("meta"):
        model = Llama(sizes)
    whole = sum(p.nbytes for p in model.parameters())
    config = hm.TrainerConfig(batch_tokens=64, max_steps=1, run_dir=folder, shard_weights=True, tokens_per_device=64)
    data = [[(i * k) % sizes.vocab for k in range(24)] for i in range(8)]
    job = hm.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), data, config)._job()
    with ExitStack() as stack:
        before, most, over = held(), [0.0], threading.Event()

        def watch() -> None:
            while not over.is_set():
                most[0] = max(most[0], held())
                time.sleep(0.001)

        watching = threading.Thread(target=watch)
        watching.start()
        fixed = FixedJob(job, world, stack)
        over.set()
        watching.join()
        state = fixed.mode.state
        assert isinstance(state, ShardedWeights)
        own = sum(f.tensor.nbytes for f in state.fragments)
        world.barrier()
        return most[0] - before, own, whole


def held() -> float:
    """Bytes of this process's own memory: without files that it looks into."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return float(line.split()[1]) * 1024


def test_no_rank_ever_holds_the_model(tmp_path: Path) -> None:
    for most, own, whole in run_ranks(2, held_at_start, tmp_path):
        assert own < 0.6 * whole
        assert most - own < 0.25 * whole, f"{most:,.0f} bytes held, {own:,.0f} of them this rank's, of {whole:,.0f}"


NOTED: list[int] = []


class Noted(ShardedWeights):
    """Notes how many weights are gathered in 16 bit."""

    def __init__(self, *parts: Any, working: Mapping[nn.Parameter, torch.dtype], **more: Any) -> None:
        NOTED.append(len(working))
        super().__init__(*parts, working=working, **more)


def twice(world: World, folder: Path) -> tuple[tuple[float, ...], bool, str]:
    trainer = trainer_of("Transformers, initialised", folder, shard_weights=True, max_steps=2, precision="bf16")
    with patch.object(layer_by_layer, "ShardedWeights", Noted):
        losses = trainer.fit().losses
    works_in_halves = min(NOTED) > 0
    try:
        trainer.fit()
    except hm.UserError as error:
        return losses, works_in_halves, str(error)
    return losses, works_in_halves, ""


def test_layers_in_16_bit_are_evaluated_as_they_are_and_a_second_fit_is_refused(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
        (folder / "cost.toml").write_text(gather_costs(128))
    kind = "Transformers, initialised"
    expected = trainer_of(kind, alone, max_steps=2, precision="bf16").fit().losses
    for losses, works_in_halves, told in run_ranks(2, twice, together):
        assert losses == pytest.approx(expected, rel=5e-3)  # as far as bf16 goes
        assert works_in_halves
        assert "dealt out by the fit() before" in told
    assert evaluations(together / kind) == pytest.approx(evaluations(alone / kind), rel=5e-3)


def test_files_are_loaded_into_real_weights_once(tmp_path: Path) -> None:
    write_files(tmp_path)
    torch.manual_seed(2)
    model, other = transformers_model(), from_transformers()
    InitialWeights(other, tmp_path / "weights", 0).fill(torch.device("cpu"))
    config = hm.TrainerConfig(batch_tokens=60, max_steps=1, run_dir=tmp_path / "run", plan_seconds=0.02, resume="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = hm.Trainer(model, optimizer, [[1, 2, 3, 4]] * 9, config, weights=tmp_path / "weights")
    trainer.fit()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    trainer._job().initial.fill(torch.device("cpu"))
    assert not model.lm_head.weight.any(), "a second fit goes on with what the model has"
