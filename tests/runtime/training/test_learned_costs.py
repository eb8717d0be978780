"""Training corrects its costs by what passes took, and plans follow."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.runtime.report.compare import compare_run, comparison_text, read_run
from llama import Llama
from ranks import World, run_ranks
from steps import TINY


class Weary(Llama):
    """A model whose passes take rank 1 longer, from some moment of the training on."""

    def __init__(self, rank: int) -> None:
        super().__init__(TINY)
        self.rank, self.steps = rank, 0

    def forward(self, input_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if self.rank == 1 and self.steps:
            time.sleep(4e-4 * input_ids.numel())
        else:
            time.sleep(1e-4 * input_ids.numel())
        return super().forward(input_ids, *rest, **named)


def train_weary(world: World, folder: Path) -> tuple[float, ...]:
    torch.manual_seed(7)
    model = Weary(world.rank)
    data = [torch.tensor([random.Random(i).randrange(TINY.vocab) for _ in range(20 + i % 9)]) for i in range(90)]
    config = hm.TrainerConfig(batch_tokens=800, max_steps=12, run_dir=folder, plan_seconds=0.02)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: setattr(model, "steps", model.steps + 1))
    return hm.Trainer(model, optimizer, data, config).fit().losses


@pytest.mark.alone
def test_training_moves_work_away_from_a_rank_that_became_slow(tmp_path: Path) -> None:
    losses = run_ranks(2, train_weary, tmp_path / "run", seconds=120)
    assert losses[0] == losses[1]
    run = read_run(tmp_path / "run")
    tokens = [[sum(p.tokens(p.ranks.index(r)) for _, p in s.plan.passes_of(r)) for r in (0, 1)] for s in run.steps]
    first, last = (a / b for a, b in (tokens[0], tokens[-1]))
    assert first < 1.6 < 1.9 < last, tokens
    compared = compare_run(run)
    assert compared.last_speeds[1] < 0.65 < compared.speeds[1]
    assert f"-> {compared.last_speeds[1]:g}" in comparison_text(compared)
