"""Real runs: the bytes that a plan predicts are those that are counted, and offloaded passes compute the same."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import heteromesh as hm
import llama
from heteromesh.parallel.model.offload import OffloadCount
from heteromesh.planner.model.attention import AttentionShape, ModelAttention
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.splitting.traffic import pass_bytes
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.engine import passes as executors
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.report.compare import compare_run, comparison_text, read_run
from heteromesh.runtime.trainer import Trainer
from heteromesh.runtime.work.reader import Reader
from instances import random_cut
from llama import Llama
from packs import SPLIT
from ranks import World, run_ranks
from steps import TINY, reference

LOCAL = ((Mask(window=7), 1),)


def attention(forwards: int, local: tuple[tuple[Mask, int], ...] = ()) -> ModelAttention:
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=8, itemsize=4)
    return ModelAttention(calls=2, shape=shape, forwards=forwards, local=local)


@contextmanager
def windows(on: bool) -> Iterator[None]:
    """The second of the model's two layers sees 7 keys."""
    # by thread: the check before the first step runs two ranks as threads
    calls: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hm.attention(q, k, v, window=LOCAL[0][0].window if next(calls[get_ident()]) % 2 else None)

    with patch.object(llama, "hm", SimpleNamespace(attention=attend)) if on else nullcontext():
        yield


def forced_step(
    method: str, ranks: int, forwards: int, offload: float = 0.0, local: tuple[tuple[Mask, int], ...] = ()
) -> Step:
    """Two passes of uneven shards with that method over all ranks, and a local one."""
    rng = random.Random(5)
    batch, passes = (40, 23, 61, 9), []
    for sequences in ((0, 1), (2,)):
        rows = [[n + 1 for n in random_cut(rng, batch[k] - ranks, ranks)] for k in sequences]
        shards = tuple(zip(*rows, strict=True))
        asked = attention(forwards, local)
        sent = pass_bytes(method, [batch[k] for k in sequences], shards, (1.0,) * ranks, asked)
        passes.append(
            Pass(
                ranks=tuple(range(ranks)),
                method=method,
                sequences=sequences,
                shards=shards,
                seconds=0.0,
                sent_bytes=sent,
                offload=offload,
            )
        )
    passes.append(Pass(ranks=(0,), method="local", sequences=(3,), shards=((9,),), seconds=0.0, sent_bytes=(0,)))
    return Step(passes=tuple(passes), seconds=0, bound_seconds=0, gap=0, solve_seconds=0, batch=batch)


def count(world: World, recompute: bool, local: tuple[tuple[Mask, int], ...] = ()) -> None:
    methods = [*SPLIT, "ulysses_ring:1"] + ["ulysses_ring:2"] * (world.size == 4)
    executor = StepExecutor(Llama(TINY), world, checkpoint_activations=recompute)
    for method in methods:
        step = forced_step(method, world.size, executor.forwards, local=local)
        data = [torch.arange(n) % TINY.vocab for n in step.batch]
        with windows(bool(local)):
            result = executor.run(step, Reader(data).step_inputs(step, range(len(data)), world.rank))
        predicted = {
            (rank, i): sent for i, p in enumerate(step.passes) for rank, sent in zip(p.ranks, p.sent_bytes, strict=True)
        }
        assert {(p.rank, p.position): p.sent_bytes for p in result.passes} == predicted, method


@pytest.mark.parametrize(("ranks", "recompute"), [(3, False), (4, False), (2, True)])
def test_counted_bytes_of_a_step_are_the_predicted_ones(ranks: int, recompute: bool) -> None:
    run_ranks(ranks, count, recompute)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_of_layers_with_windows_are_predicted_too(ranks: int) -> None:
    run_ranks(ranks, count, False, LOCAL)


def offloaded(world: World, ratio: float) -> None:
    torch.manual_seed(1)
    model = Llama(TINY).double()
    step = forced_step("gather", world.size, 1, ratio)
    data = [torch.randint(TINY.vocab, (n,)) for n in step.batch]
    loss, gradients = reference(model, data)
    counts: list[OffloadCount] = []
    original = executors.offload

    @contextmanager
    def watched(*args, **settings):
        with original(*args, **settings) as seen:
            counts.append(seen)
            yield seen

    executors.offload = watched
    try:
        executor = StepExecutor(model, world)
        result = executor.run(step, Reader(data).step_inputs(step, range(len(data)), world.rank))
    finally:
        executors.offload = original
    assert result.loss == pytest.approx(loss, rel=1e-10)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-12)
    assert len(counts) == (2 if ratio else 0)  # the local pass keeps all
    for seen in counts:
        share = seen.moved_bytes / (seen.moved_bytes + seen.kept_bytes)
        assert 0.5 * ratio < share <= ratio
        assert seen.returned_bytes >= seen.moved_bytes


@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_offloaded_passes_change_nothing(ratio: float) -> None:
    run_ranks(2, offloaded, ratio)


def train(world: World, folder: str, local: bool) -> None:
    with windows(local):
        train_there(folder)


def train_there(folder: str) -> None:
    torch.manual_seed(0)
    model = Llama(replace(TINY, kv_heads=1))
    data = [torch.arange(i, i + n) % TINY.vocab for i, n in enumerate([90, 70, 12, 8, 5, 75, 30, 4] * 3)]
    config = TrainerConfig(batch_tokens=200, max_steps=4, run_dir=folder, tokens_per_device=60, learning_rate=1e-3)
    Trainer(model, None, data, config).fit()


@pytest.mark.parametrize("local", [False, True])
def test_explaining_a_run_shows_equal_bytes(tmp_path: Path, local: bool) -> None:
    folder = tmp_path / "run"
    run_ranks(2, train, str(folder), local)
    run = compare_run(read_run(folder))
    split = [m for m in run.methods if m.method != "local"]
    assert split
    for method in run.methods:
        assert method.predicted_bytes == method.counted_bytes
    assert all(m.counted_bytes for m in split)
    text = comparison_text(run)
    assert "predicted bytes  counted bytes" in text
    assert "Methods of split passes (* chosen)" in text
    assert {o.method for o in run.kinds[0].options} > {"gather", "ulysses", "trimmed_ring"}
