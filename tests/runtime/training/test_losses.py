"""Losses of docs/losses.md against plain torch: one item at a time, the weighted mean over the step."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

import heteromesh as hm
from llama import Llama
from ranks import World, run_ranks
from steps import TINY

STEPS = 4
random = np.random.RandomState(5)
LENGTHS = [int(n) for n in random.randint(2, 90, 40)]
Item = dict[str, Any]


def ids(length: int) -> np.ndarray:
    return random.randint(TINY.vocab, size=length)


CLASSIFIED: list[Item] = [{"input_ids": ids(n), "label": int(random.randint(TINY.vocab))} for n in LENGTHS]
WEIGHTED: list[Item] = [
    {"input_ids": ids(n), "weights": random.rand(n) * (random.rand(n) < 0.7)} for n in LENGTHS
]  # fmt: skip
PAIRS: list[Item] = [
    {"input_ids": [ids(n), ids(max(2, n // 3))], "reference": random.randn(2) * 3} for n in LENGTHS
]  # fmt: skip


DOCUMENTED: dict[str, Any] = {}
"""The functions of docs/losses.md."""
page = Path(__file__, "../../../../docs/losses.md").resolve().read_text()
exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), DOCUMENTED)


def plain_classification(model: Llama, item: Item) -> tuple[torch.Tensor, float]:
    return functional.cross_entropy(scores(model, item["input_ids"])[-1], torch.tensor(item["label"])), 1.0


def plain_weighted(model: Llama, item: Item) -> tuple[torch.Tensor, float]:
    row, weights = item["input_ids"], torch.tensor(item["weights"][:-1], dtype=torch.float32)
    losses = functional.cross_entropy(scores(model, row)[:-1], torch.tensor(row[1:]), reduction="none")
    return (losses * weights).sum(), float(weights.sum())


def plain_preference(model: Llama, item: Item) -> tuple[torch.Tensor, float]:
    sums = [
        -functional.cross_entropy(scores(model, row)[:-1], torch.tensor(row[1:]), reduction="sum")
        for row in item["input_ids"]
    ]
    chosen, rejected = (s - float(r) for s, r in zip(sums, item["reference"], strict=True))
    return -functional.logsigmoid(0.1 * (chosen - rejected)), 1.0


KINDS: dict[str, tuple[list[Item], Any, Callable[[Llama, Item], tuple[torch.Tensor, float]]]] = {
    "classification": (CLASSIFIED, DOCUMENTED["classification"], plain_classification),
    "weights by token": (WEIGHTED, DOCUMENTED["weighted"], plain_weighted),
    "pairs": (PAIRS, DOCUMENTED["preference"], plain_preference),
}


def scores(model: Llama, row: np.ndarray) -> torch.Tensor:
    return model(torch.tensor(row)[None])[0]


def job(kind: str, folder: Path, ranks: int, **changes: Any) -> tuple[hm.Trainer, Llama, list[set[int]]]:
    """The Trainer, its model and, filled as it trains, the numbers of ranks of each step's passes."""
    data, loss, _ = KINDS[kind]
    torch.manual_seed(7)
    model, seen = Llama(TINY), list[set[int]]()

    class Look(hm.Hook):
        def step_committed(self, step: hm.StepCommitted) -> None:
            seen.append({len(p.ranks) for r in step.rounds for p in r.plan.passes})

    # no rank alone can hold the longest
    room = None if ranks == 1 else int(max(total(item) for item in data) * 0.75)
    options = {"batch_tokens": 260, "max_steps": STEPS, "run_dir": folder, "plan_seconds": 0.02, "clip_norm": None}
    config = hm.TrainerConfig(**(options | {"tokens_per_device": room} | changes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return hm.Trainer(model, optimizer, data, config, hooks=[Look()], loss=loss), model, seen


def total(item: Item) -> int:
    rows = item["input_ids"]
    return sum(map(len, rows)) if isinstance(rows, list) else len(rows)


def expected(kind: str) -> tuple[list[float], np.ndarray]:
    """The losses of each step, and the weights afterwards, of plain torch."""
    data, _, plain = KINDS[kind]
    trainer, model, _ = job(kind, Path("unused"), 1)
    losses = []
    for _ in range(STEPS):
        items = [data[i] for i in trainer.sampler.next_batch().sequences]
        weight = sum(plain(model, item)[1] for item in items)
        model.zero_grad()
        parts = [plain(model, item)[0] / weight for item in items]
        torch.stack(parts).sum().backward()
        losses.append(float(torch.stack(parts).sum().detach()))
        trainer.optimizer.step()
    return losses, flat(model)


def flat(model: Llama) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def train(world: World, kind: str, folder: Path) -> tuple[list[float], np.ndarray, list[set[int]]]:
    trainer, model, seen = job(kind, folder, world.size)
    return list(trainer.fit().losses), flat(model), seen


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_ones_own_is_plain_torchs(kind: str, ranks: int, tmp_path: Path) -> None:
    wanted, weights = expected(kind)
    for losses, found, seen in run_ranks(ranks, train, kind, tmp_path):
        assert losses == pytest.approx(wanted, rel=2e-5)
        assert found == pytest.approx(weights, abs=3e-5)
        assert set().union(*seen) >= ({1} if ranks == 1 else {1, 2}), "packed passes and split ones"


def train_twice(world: World, folder: Path) -> tuple[list[float], np.ndarray]:
    first = list(job("pairs", folder, world.size, max_steps=2)[0].fit().losses)
    trainer, model, _ = job("pairs", folder, world.size, resume=True)
    return first + list(trainer.fit().losses), flat(model)


def test_a_run_with_pairs_resumes(tmp_path: Path) -> None:
    wanted, weights = expected("pairs")
    for losses, found in run_ranks(2, train_twice, tmp_path):
        assert losses[-2:] == pytest.approx(wanted[-2:], rel=2e-5)
        assert found == pytest.approx(weights, abs=3e-5)
