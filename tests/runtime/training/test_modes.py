"""Modes times features: whatever the mode, losses are those of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from modes import FROM_FILE, MARK, MODES, Mode, Result, Run, in_mode, make_job, write_files

STEPS, RESUMED, ELSEWHERE = 4, 6, 8
"""The last steps of a run, of the one that continues it and of that on another number of ranks."""
pytestmark = pytest.mark.timeout(600)  # each mode trains five times


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """All runs of one mode."""

    mode: Mode
    folder: Path
    results: dict[str, list[Result]]
    """By rank."""
    alone: Path
    """The run directory of one process."""
    matrices: tuple[float, ...]
    """Losses of one process with an optimizer that needs whole matrices."""
    scaled: tuple[float, ...]
    """Losses of one process in fp16, with loss scaling."""

    def losses(self, run: str) -> tuple[float, ...]:
        """Equal on every rank, as the parameters are."""
        results = self.results[run]
        assert not any(result.failed for result in results), "\n".join(result.failed for result in results)
        assert len({(result.losses, result.digest) for result in results}) == 1
        return results[0].losses

    def one(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return rows(self.alone / name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that knows of no ranks, a little longer than the others."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    make_job(folder, {"max_steps": ELSEWHERE + 1}).fit()
    return folder


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, ...]:
    """The losses of one process whose optimizer needs whole matrices."""
    folder = tmp_path_factory.mktemp("matrices") / "run"
    return make_job(folder, {"max_steps": FROM_FILE}, matrices=True).fit().losses


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, ...]:
    """The losses of one process in fp16."""
    folder = tmp_path_factory.mktemp("scaled") / "run"
    return make_job(folder, {"max_steps": FROM_FILE, "precision": "fp16"}).fit().losses


@pytest.fixture(scope="module", params=MODES)
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    alone: Path,
    matrices: tuple[float, ...],
    scaled: tuple[float, ...],
) -> Trained:
    mode, folder = MODES[request.param], tmp_path_factory.mktemp("mode")
    described = write_files(folder, mode)
    costs: dict[str, Any] = {"cost": described["cost"]} | mode.plan(folder, mode.ranks)
    runs = {
        "begun": Run(folder=folder / "run", settings={"max_steps": STEPS} | mode.plan(folder, mode.ranks)),
        "resumed": Run(folder=folder / "run", settings={"max_steps": RESUMED, "resume": True} | costs),
        "described": Run(folder=folder / "described", settings={"max_steps": FROM_FILE + 1} | described),
        "matrices": Run(
            folder=folder / "matrices", settings={"max_steps": FROM_FILE} | mode.plan(folder, mode.ranks), matrices=True
        ),
        "scaled": Run(
            folder=folder / "scaled",
            settings={"max_steps": FROM_FILE, "precision": "fp16"} | mode.plan(folder, mode.ranks),
        ),
        "int8": Run(folder=folder / "int8", settings={"max_steps": STEPS, "gradient_compression": "int8"} | costs),
    }
    results = dict(zip(runs, in_mode(mode, mode.ranks, list(runs.values())), strict=True))
    costs |= mode.plan(folder, mode.others)
    elsewhere = Run(folder=folder / "run", settings={"max_steps": ELSEWHERE, "resume": True} | costs)
    results["elsewhere"] = in_mode(mode, mode.others, [elsewhere])[0]
    return Trained(mode=mode, folder=folder, results=results, alone=alone, matrices=matrices, scaled=scaled)


def curve(trained: Trained, run: str, first: int, last: int) -> None:
    expected = [row["loss"] for row in trained.one()][first - 1 : last]
    assert trained.losses(run) == pytest.approx(expected, rel=1e-5)


def dropout(trained: Trained) -> None:
    curve(trained, "begun", 1, STEPS)


def resume(trained: Trained) -> None:
    curve(trained, "resumed", STEPS + 1, RESUMED)


def resume_on_another_number_of_ranks(trained: Trained) -> None:
    curve(trained, "elsewhere", RESUMED + 1, ELSEWHERE)


def clip(trained: Trained) -> None:
    norms = [row["grad_norm"] for row in rows(trained.folder / "run/metrics.jsonl")]
    assert min(norms) > 0.5, "every step was clipped"
    assert norms == pytest.approx([row["grad_norm"] for row in trained.one()][:ELSEWHERE], rel=1e-4)


def checkpoint(trained: Trained) -> None:
    kept = sorted(path.name for path in (trained.folder / "run/checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (RESUMED, ELSEWHERE)]
    shutil.copytree(trained.folder / "run", trained.folder / "copy")
    last = make_job(trained.folder / "copy", {"max_steps": ELSEWHERE + 1, "resume": True}).fit().losses
    assert last == pytest.approx([trained.one()[ELSEWHERE]["loss"]], rel=1e-5), "one process goes on from it"


def planned(trained: Trained) -> dict[str, Any]:
    """The plan file of the described run."""
    stages = f"stages-{trained.mode.ranks}-described.json"
    plan: dict[str, Any] = json.loads((trained.folder / (stages if trained.mode.stages else "plan.json")).read_text())
    return plan


def plan_file(trained: Trained) -> None:
    curve(trained, "described", 1, FROM_FILE + 1)
    plan = planned(trained)
    if trained.mode.stages:
        config = json.loads((trained.folder / "described/config.json").read_text())
        assert config["stages"] == plan["layout"]["placement"]["stages"]
        return
    recorded = [row["plan"] for row in rows(trained.folder / "described/plan.jsonl")]
    assert recorded[:FROM_FILE] == plan["steps"]
    assert recorded[FROM_FILE]["gap"] != MARK, "then the planner goes on"


def cluster_file(trained: Trained) -> None:
    curve(trained, "described", 1, FROM_FILE + 1)
    plan = planned(trained)
    config = json.loads((trained.folder / "described/config.json").read_text())
    assert config["cluster"]["fingerprint"] == plan["cluster"]["fingerprint"]


def cost_file(trained: Trained) -> None:
    curve(trained, "described", 1, FROM_FILE + 1)
    config = json.loads((trained.folder / "described/config.json").read_text())
    assert config["costs"]["constants"]["seconds_per_token"] == 1e-4
    if trained.mode.stages:
        return
    passes = [p for row in rows(trained.folder / "described/plan.jsonl") for p in row["plan"]["passes"]]
    assert all(max(sum(tokens) for tokens in p["shards"]) <= 64 for p in passes), "as many tokens as fit by the file"
    assert any(len(p["ranks"]) > 1 for p in passes)


def compression(trained: Trained) -> None:
    expected = [row["loss"] for row in trained.one()][:STEPS]
    losses = trained.losses("int8")
    assert losses == pytest.approx(expected, abs=0.02)
    assert losses != pytest.approx(expected, abs=1e-6), "gradients were compressed"
    assert json.loads((trained.folder / "int8/config.json").read_text())["gradient_compression"] == "int8"


def whole_matrices(trained: Trained) -> None:
    settings, reason = trained.mode.settings, ""
    if trained.mode.elastic and (settings.get("shard_optimizer") or settings.get("shard_weights")):
        reason = "Adafactor is not element-wise, and where members come and go"
    elif settings.get("offload_optimizer") == "disk":
        reason = "torch.optim.AdamW alone"
    if reason:
        assert all(reason in result.failed for result in trained.results["matrices"])
        return
    assert trained.losses("matrices") == pytest.approx(trained.matrices, rel=1e-5)


def loss_scaling(trained: Trained) -> None:
    assert trained.losses("scaled") == pytest.approx(trained.scaled, rel=2e-3)
    for row in rows(trained.folder / "scaled/metrics.jsonl"):
        assert row["loss_scale"] >= 1024


def metrics(trained: Trained) -> None:
    written = rows(trained.folder / "run/metrics.jsonl")
    assert [row["step"] for row in written] == list(range(1, ELSEWHERE + 1))
    losses = sum((trained.losses(run) for run in ("begun", "resumed", "elsewhere")), ())
    assert [row["loss"] for row in written] == list(losses)
    assert [row["tokens"] for row in written] == [row["tokens"] for row in trained.one()][:ELSEWHERE]
    ledgers = rows(trained.folder / "run/ledger.jsonl"), trained.one("ledger.jsonl")[:ELSEWHERE]
    mine, theirs = ([sorted(i for its in row["trained"].values() for i in its) for row in rows] for rows in ledgers)
    assert mine == theirs, "every sequence of every batch once"


def evaluation_hook(trained: Trained) -> None:
    found, expected = rows(trained.folder / "run/evaluations.jsonl"), trained.one("evaluations.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["held_out"] for row in found] == pytest.approx([row["held_out"] for row in expected], rel=1e-5)


FEATURES: dict[str, Callable[[Trained], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        dropout,
        resume,
        resume_on_another_number_of_ranks,
        clip,
        checkpoint,
        plan_file,
        cluster_file,
        cost_file,
        compression,
        whole_matrices,
        loss_scaling,
        metrics,
        evaluation_hook,
    )
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_in_every_mode(trained: Trained, feature: str) -> None:
    FEATURES[feature](trained)
