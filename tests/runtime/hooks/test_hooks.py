"""Hooks of users: called when promised, on every rank; what they find is recorded; one that raises stops the run."""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from elastic_jobs import Job
from heteromesh.errors import UserError
from ranks import World, run_ranks
from trainers import DATA, make_trainer

RAISING = ("step_committed", "evaluate", "evaluated", "checkpoint_saved", "end")


class Watch(hm.Hook):
    """Writes down its calls; evaluates the mean loss of some sequences, of which each rank does a part."""

    evaluate_every = 2

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def step_committed(self, step: hm.StepCommitted) -> None:
        self.calls.append(("step", step.metrics.step))

    def evaluate(self, step: int, model: torch.nn.Module, world: Any) -> Mapping[str, float]:
        self.calls.append(("evaluate", step, model.training, torch.is_grad_enabled()))
        total = torch.zeros(2, dtype=torch.float64)
        for sequence in DATA[world.rank : 8 : world.size]:
            tokens = torch.tensor(sequence)[None]
            logits = model(tokens, torch.arange(len(sequence))[None])[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits.double(), tokens[0, 1:], reduction="none")
            total += torch.tensor([losses.sum(), losses.numel()], dtype=torch.float64)
        loss, count = world.sum(total).tolist()
        return {"loss": loss / count}

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("evaluated", step, values["loss"]))

    def checkpoint_saved(self, step: int, path: Path) -> None:
        self.calls.append(("saved", step, path.name))

    def end(self, report: hm.TrainingReport) -> None:
        self.calls.append(("end", report.last_step))


class Raises(Watch):
    """Raises in one method, from the third step on."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method


def raising_method(name: str) -> Callable[..., Any]:
    def method(self: Raises, *arguments: Any) -> Any:
        if self.method == name and (name == "end" or max((call[1] for call in self.calls), default=0) >= 3):
            raise KeyError("no such thing")
        return getattr(Watch, name)(self, *arguments)

    return method


for name in RAISING:
    setattr(Raises, name, raising_method(name))


def watched(world: World, folder: Path, sharded: bool) -> list[tuple[Any, ...]]:
    trainer = make_trainer(folder, max_steps=5, checkpoint_every=3, shard_optimizer=sharded)
    trainer.hooks = (Watch(),)
    frozen = trainer.model.layers[0].eval()  # type: ignore[index,union-attr]
    trainer.fit()
    assert trainer.model.training, "the model is in its own mode again"
    assert not frozen.training, "and so is each of its modules"
    return trainer.hooks[0].calls  # type: ignore[attr-defined]


def test_every_method_is_called_on_every_rank_when_promised(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a sharded optimizer too, evaluations see the parameters of the step that they come after."""
    alone = watched(World(), tmp_path / "one", False)
    values = [call[2] for call in alone if call[0] == "evaluated"]
    assert alone == [
        ("step", 1),
        ("step", 2),
        ("evaluate", 2, False, False),
        ("evaluated", 2, values[0]),
        ("step", 3),
        ("saved", 3, "step-00000003"),
        ("step", 4),
        ("evaluate", 4, False, False),
        ("evaluated", 4, values[1]),
        ("step", 5),
        ("saved", 5, "step-00000005"),
        ("end", 5),
    ]
    for calls in run_ranks(2, watched, tmp_path / "two", True):
        assert [call[:2] for call in calls] == [call[:2] for call in alone]
        assert [call[2] for call in calls if call[0] == "evaluated"] == pytest.approx(values, abs=1e-5)
    assert f"evaluation after step 2: loss {values[0]:.4f}" in capfd.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "one/evaluations.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": values[0]}, {"step": 4, "loss": values[1]}]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is an extra and is not installed")
def test_evaluations_are_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    calls = watched(World(), tmp_path / "run", False)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    told = [(e.step, e.value) for e in events.Scalars("evaluation/loss")]
    assert told == [(call[1], pytest.approx(call[2])) for call in calls if call[0] == "evaluated"]


def raising(world: World, folder: Path, steps: int) -> dict[str, str]:
    """By method, what is told on a rank when the hook of the last rank raises in step 4."""
    told = {}
    for method in RAISING:
        trainer = make_trainer(folder / method, max_steps=steps, checkpoint_every=4)
        trainer.hooks = (Raises(method) if world.rank == world.size - 1 else Watch(),)
        try:
            trainer.fit()
        except UserError as error:
            told[method] = str(error)
        again = make_trainer(folder / method, max_steps=steps + 1, resume=True).fit()
        assert again.last_step == steps + 1
        assert again.first_step == int(told[method].rpartition("after step ")[2].split()[0]) + 1, told[method]
    return told


@pytest.mark.parametrize(("ranks", "steps"), [(1, 7), (2, 4)])
def test_a_hook_that_raises_is_named_everywhere_and_the_run_is_saved(ranks: int, steps: int, tmp_path: Path) -> None:
    """Also in what comes after the last step; and a second `fit` in the process resumes.

    In `evaluate` the other rank is waiting in `world.sum` by then.
    """
    for told in run_ranks(ranks, raising, tmp_path, steps):
        for method in RAISING:
            assert f"hook Raises.{method} raised KeyError: 'no such thing' at step " in told[method]
            assert f"on rank {ranks - 1} (mend the hook, then resume); the run is saved after step" in told[method]


@pytest.mark.parametrize("method", ["evaluate", "end"])
def test_a_hook_that_raises_on_one_member_ends_the_job_for_all(method: str, tmp_path: Path) -> None:
    with Job(tmp_path, least=2, gather=5.0) as job:
        for index, hook in enumerate((Watch(), Raises(method))):
            job.start(index, max_steps=5, hooks=(hook,))
        told = [job.result(index, 120) for index in (0, 1)]
    assert told[0] == told[1]
    assert told[0].startswith(f"UserError: hook Raises.{method} raised KeyError: 'no such thing' at step ")
    assert "on host:1 (mend the hook, then resume); the run is saved after step" in told[0]
    assert make_trainer(tmp_path / "run", max_steps=6, resume=True).fit().last_step == 6
