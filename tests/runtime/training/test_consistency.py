"""Ranks that were told different things end in one sentence on every rank, before the first step."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.errors import UserError
from heteromesh.runtime.training.consistency import check_equal
from llama import Llama
from ranks import World, run_ranks
from steps import TINY

DATA = [torch.tensor([random.Random(i).randrange(TINY.vocab) for _ in range(20)]) for i in range(12)]
CLUSTER = """
[[hosts]]
names = ["a"]
device = "cpu"
count = 2
nics = [{{ kind = "ethernet", gbit = {gbit} }}]
{more}
"""
MEASURED = "[measured]\nspeeds = [1, {speed}]\n"


def fit(folder: Path, rank: int, what: str) -> None:
    """A run in which rank 1 was told something else."""
    torch.manual_seed(7)
    other = rank == 1
    settings: dict[str, Any] = {"batch_tokens": 60, "max_steps": 2, "run_dir": folder / "run"}
    model = Llama(TINY)
    data = list(DATA)
    optimizer = None
    if what in CHANGES and other:
        settings |= CHANGES[what]
    elif what in ("cluster", "measured"):
        path = folder / f"cluster-{rank}.toml"
        more = MEASURED.format(speed=1 - rank / 2) if what == "measured" else ""
        path.write_text(CLUSTER.format(gbit=1 + (other and what == "cluster"), more=more))
        settings["cluster"] = path
    elif what == "no cluster file" and other:
        settings["cluster"] = folder / "missing.toml"
    elif what == "plan":
        settings["plan"] = folder / f"plan-{rank}.json"
        settings["plan"].write_text(f"{{{rank}}}")
    elif what == "version" and other:
        hm.__version__ = "9.9.9"
    elif what == "data" and other:
        data[3] = data[3][:-1]
    elif what == "shape" and other:
        model = Llama(replace(TINY, layers=TINY.layers + 1))
    elif what == "frozen" and other:
        next(model.parameters()).requires_grad_(False)
    elif what == "optimizer":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1 * rank)
    hm.Trainer(model, optimizer, data, hm.TrainerConfig(**settings)).fit()


CHANGES: dict[str, dict[str, Any]] = {
    "batch_tokens": {"batch_tokens": 61},
    "seed": {"seed": 3},
    "shard_optimizer": {"shard_optimizer": True},
    "gradient_compression": {"gradient_compression": "int8"},
    "precision": {"precision": "bf16"},
    "run_dir": {"run_dir": "elsewhere"},
}
WORDS = {
    "batch_tokens": "rank 1 has batch_tokens 61 and rank 0 has 60: give every rank the same TrainerConfig",
    "seed": "rank 1 has seed 3 and rank 0 has 0: give",
    "shard_optimizer": "rank 1 has shard_optimizer True and rank 0 has False: give every rank the same TrainerConfig",
    "gradient_compression": "rank 1 has gradient_compression 'int8' and rank 0 has 'none'",
    "precision": "rank 1 has precision 'bf16' and rank 0 has 'fp32'",
    "run_dir": "elsewhere and rank 0 has",
    "cluster": "rank 1 has the cluster file's fingerprint",
    "measured": "rank 1 has the cluster file's measured values",
    "no cluster file": "on rank 1, ",
    "plan": "rank 1 has the plan file",
    "version": "rank 1 has heteromesh's version 9.9.9 and rank 0 has 0.",
    "data": "rank 1 has the data 12 sequences",
    "shape": "and rank 0 has none (and 6 more): build the same model on every rank",
    "frozen": ", frozen and rank 0 has ",
    "optimizer": "rank 1 has the optimizer's weight_decay (group 0) 0.1 and rank 0 has 0.0: make the same optimizer",
}


def messages(world: World, folder: Path) -> dict[str, str]:
    told = {}
    for what in WORDS:
        version = hm.__version__
        try:
            fit(folder, world.rank, what)
        except UserError as error:
            told[what] = str(error)
        finally:
            hm.__version__ = version
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(2, messages, tmp_path_factory.mktemp("agree"))


@pytest.mark.parametrize("what", WORDS)
def test_a_rank_that_was_told_something_else_is_named_on_every_rank(what: str, told: list[dict[str, str]]) -> None:
    assert WORDS[what] in told[0][what]
    assert told[1][what] == told[0][what]


def facts_by_rank(world: World, rows: list[dict[str, tuple[str, str]] | str]) -> str:
    def tell() -> dict[str, tuple[str, str]]:
        row = rows[world.rank]
        if isinstance(row, str):
            raise UserError(row)
        return row

    try:
        check_equal(world, tell)
    except UserError as error:
        return str(error)
    return "agreed"


def many(world: World) -> list[str]:
    a, b = ("model", "1"), ("model", "2")
    cases: list[list[dict[str, tuple[str, str]] | str]] = [
        [{"x": a}, {"x": a}, {"x": a}],
        [{"x": a, "y": a}, {"x": a, "y": a}, {"x": b, "y": b}],
        [{"x": a}, {"x": a, "y": a}, {"x": a}],
        [{"x": a, "y": b}, {"y": b, "x": a}, {"x": a, "y": b}],
        [{"x": a}, {"x": a}, "no file: bring it"],
        ["no file", "no file", "no file"],
    ]
    return [facts_by_rank(world, case) for case in cases]


def test_three_ranks() -> None:
    same = "build the same model on every rank"
    for row in run_ranks(3, many):
        assert row == [
            "agreed",
            f"rank 2 has x 2 and rank 0 has 1 (and 1 more): {same}",
            f"rank 1 has y 1 and rank 0 has none: {same}",
            f"rank 1 has the x in another order than rank 0: {same}",
            "on rank 2, no file: bring it",
            "no file",
        ]


def test_one_rank_still_reads_its_files(tmp_path: Path) -> None:
    config = hm.TrainerConfig(batch_tokens=60, max_steps=1, run_dir=tmp_path / "run", cluster=tmp_path / "none.toml")
    with pytest.raises(UserError, match=r"none\.toml"):
        hm.Trainer(Llama(TINY), None, DATA, config).fit()
