"""Training corrects its costs by what passes took, and plans follow."""

import random
import time
from pathlib import Path
from typing import Any

import torch

import heteromesh as hm
from heteromesh.comm import exchange
from heteromesh.runtime.engine import calibrate, passes
from heteromesh.runtime.report.compare import compare_run, comparison_text, read_run
from llama import Llama
from ranks import World, run_ranks
from steps import TINY


class Clock:
    """What stands in for the module `time` where passes are timed: only a model's forward takes any, by its tokens."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)

    def time_ns(self) -> int:
        return time.time_ns()


class Weary(Llama):
    """A model whose passes take rank 1 longer, from some moment of the training on."""

    def __init__(self, rank: int, clock: Clock) -> None:
        super().__init__(TINY)
        self.rank, self.steps, self.clock = rank, 0, clock

    def forward(self, input_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        self.clock.now += (4e-4 if self.rank == 1 and self.steps else 1e-4) * input_ids.numel()
        return super().forward(input_ids, *rest, **named)


def train_weary(world: World, folder: Path) -> tuple[float, ...]:
    clock = Clock()
    for module in (calibrate, exchange, passes):
        module.time = clock  # type: ignore[attr-defined]
    torch.manual_seed(7)
    model = Weary(world.rank, clock)
    data = [torch.tensor([random.Random(i).randrange(TINY.vocab) for _ in range(20 + i % 9)]) for i in range(90)]
    config = hm.TrainerConfig(batch_tokens=800, max_steps=12, run_dir=folder, plan_seconds=0.02)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: setattr(model, "steps", model.steps + 1))
    return hm.Trainer(model, optimizer, data, config).fit().losses


def test_training_moves_work_away_from_a_rank_that_became_slow(tmp_path: Path) -> None:
    losses = run_ranks(2, train_weary, tmp_path / "run")
    assert losses[0] == losses[1]
    run = read_run(tmp_path / "run")
    tokens = [[sum(p.tokens(p.ranks.index(r)) for _, p in s.plan.passes_of(r)) for r in (0, 1)] for s in run.steps]
    first, last = (a / b for a, b in (tokens[0], tokens[-1]))
    assert first < 1.6 < 1.9 < last, tokens
    compared = compare_run(run)
    assert compared.last_speeds[1] < 0.65 < compared.speeds[1]
    assert f"-> {compared.last_speeds[1]:g}" in comparison_text(compared)
