"""Jobs that can't be trained end in one sentence before the first step; what a resume finds changed has a rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import heteromesh as hm
from heteromesh.errors import UserError
from llama import Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA

TENSORS = [torch.tensor(s) for s in DATA]


def fit(
    folder: Path,
    make: Callable[[nn.Module], Any] = lambda model: (None, None),
    model: nn.Module | None = None,
    data: Any = None,
    **changes: Any,
) -> hm.TrainingReport:
    torch.manual_seed(7)
    model = model or Llama(TINY)
    optimizer, schedule = make(model)
    settings = {"batch_tokens": 220, "max_steps": 2, "run_dir": folder / "run", "plan_seconds": 0.02, "print_plans": 0}
    config = hm.TrainerConfig(**(settings | changes))
    return hm.Trainer(model, optimizer, TENSORS if data is None else data, config, schedule=schedule).fit()


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **({"lr": 1e-3} | options))


def of_another(model: nn.Module) -> Any:
    mine = adamw(model)
    return mine, lr_scheduler.ExponentialLR(adamw(Llama(TINY)), 0.9)


def plateau(model: nn.Module) -> Any:
    mine = adamw(model)
    return mine, lr_scheduler.ReduceLROnPlateau(mine)


def tensor_rate(model: nn.Module) -> Any:
    mine = adamw(model, lr=torch.tensor(1e-3))
    return mine, lr_scheduler.ExponentialLR(mine, 0.9)


class Opaque(lr_scheduler.LRScheduler):
    """A schedule with something in its state that no checkpoint takes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [0.1 for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"secret": Path("x"), "last_epoch": self.last_epoch}


def opaque(model: nn.Module) -> Any:
    mine = adamw(model)
    return mine, Opaque(mine)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: (torch.optim.LBFGS(m.parameters()), None), "LBFGS.step needs 'closure'"),
        (plateau, "ReduceLROnPlateau.step needs 'metrics'"),
        (lambda m: (adamw(Llama(TINY)), None), "parameters of the optimizer (AdamW) are not the model's"),
        (of_another, "the schedule (ExponentialLR) is of another optimizer than the one given (AdamW)"),
        (lambda m: (None, of_another(m)[1]), "is of another optimizer than the one given (AdamW)"),
        (tensor_rate, "the learning rate is a tensor and there is a schedule (ExponentialLR)"),
        (opaque, "the schedule's (Opaque) 'secret', a PosixPath, can't be saved in a checkpoint"),
        (lambda m: (adamw(m.requires_grad_(False)), None), "parameters of Llama are frozen"),
    ],
)
def test_optimizers_and_schedules_that_cant_be_used_are_told(
    make: Callable[[nn.Module], Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        fit(tmp_path, make)
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


class Wrapped(nn.Module):
    """A model that returns something else."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = Llama(TINY), wrap

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.wrap(self.inner(input_ids, position_ids))


class WithoutPositions(Llama):
    """Numbers its tokens itself."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_ids)


class Learned(Llama):
    """With a table of positions."""

    def __init__(self, size: int) -> None:
        super().__init__(TINY)
        self.wpe = nn.Embedding(size, TINY.hidden)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        assert position_ids is not None
        cos, sin = self._rope(position_ids)
        x = self.embed(input_ids) + self.wpe(position_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


class Output:
    """As Transformers' outputs."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


LABELLED = {"input_ids": [1, 2, 3], "labels": [2, 61, -100]}


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (lambda: Wrapped(lambda y: (y, None)), None, "Wrapped returned a tuple of 2: it must return a tensor"),
        (lambda: Wrapped(lambda y: Output(logits=y, aux_loss=y.mean())), None, "Wrapped returned aux_loss = "),
        (lambda: Wrapped(lambda y: Output(hidden=y)), None, "Wrapped returned a Output: it must"),
        (lambda: WithoutPositions(TINY), None, "WithoutPositions.forward takes input_ids and no position_ids"),
        (lambda: Llama(TINY), [*TENSORS, torch.tensor([1, 61, 2])], "sequence 60 of the data has the token id 61"),
        (lambda: Llama(TINY), [torch.tensor([1, -3, 2])], "sequence 0 of the data has the token id -3"),
        (lambda: Learned(80), None, "has 91 tokens, and the model's table of positions (wpe) has 80: cut"),
        (lambda: Llama(TINY), [LABELLED], "sequence 0 of the data has the label 61, and the model has logits for 61"),
    ],
)
def test_models_and_data_that_dont_fit_are_told(
    model: Callable[[], nn.Module], data: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        fit(tmp_path, model=model(), data=data)
    assert words in str(error.value), error.value


def told_everywhere(world: World, folder: Path) -> str:
    try:
        fit(folder, model=Learned(80))
    except UserError as error:
        return str(error)
    return ""


def test_a_table_that_is_too_small_is_told_on_every_rank(tmp_path: Path) -> None:
    assert all("table of positions (wpe) has 80" in message for message in run_ranks(2, told_everywhere, tmp_path))


def stepped(model: nn.Module) -> Any:
    optimizer = adamw(model)
    return optimizer, lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.1)


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def resumed(world: World, folder: Path) -> list[float]:
    fit(folder, stepped, max_steps=4)
    fit(folder, stepped, max_steps=8, resume=True)
    return rates(folder)


def test_a_schedule_with_milestones_goes_on_after_a_resume(tmp_path: Path) -> None:
    expected = [1e-3] * 2 + [1e-4] * 3 + [1e-5] * 3
    assert run_ranks(1, resumed, tmp_path)[0] == pytest.approx(expected)


def test_another_learning_rate_at_a_resume_wins_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, max_steps=2, learning_rate=1e-3)
    fit(tmp_path, max_steps=4, resume=True, learning_rate=1e-5)
    fit(tmp_path, lambda m: (adamw(m, lr=1e-5, betas=(0.8, 0.9)), None), max_steps=6, resume=True)
    assert rates(tmp_path) == pytest.approx([1e-3] * 2 + [1e-5] * 4)
    told = capsys.readouterr().out
    assert "lr (group 0) is 1e-05, the checkpoint's run began with 0.001: 1e-05 counts from here on" in told
    assert "betas (group 0) is (0.8, 0.9), the checkpoint's run began with [0.9, 0.999]" in told
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["optimizer"]["type"] == "AdamW"
    assert config["optimizer"]["groups"][0]["lr"] == 1e-5
    assert config["optimizer"]["groups"][0]["betas"] == [0.8, 0.9]


def test_another_rate_or_schedule_under_a_schedule_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, stepped, max_steps=2)

    def faster(model: nn.Module) -> Any:
        optimizer = adamw(model, lr=1e-2)
        return optimizer, lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.1)

    with pytest.raises(UserError, match=r"is 0.01.*MultiStepLR goes on from the old one: resume with lr=0.001"):
        fit(tmp_path, faster, max_steps=4, resume=True)
    with pytest.raises(UserError, match="was trained with MultiStepLR and this run has none"):
        fit(tmp_path, lambda m: (adamw(m), None), max_steps=4, resume=True)
    fit(tmp_path, stepped, max_steps=4, resume=True)


class Moody(Llama):
    """Notes in which mode it was called with gradients."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.still, self.modes = nn.Dropout(0.0), []

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.modes.append((self.training, self.still.training))
        return super().forward(input_ids, position_ids)


def test_a_model_in_eval_is_trained_in_train_and_put_back(tmp_path: Path) -> None:
    model = Moody().eval()
    fit(tmp_path / "a", model=model)
    assert set(model.modes) == {(True, True)}
    assert not any(module.training for module in model.modules())
    model = Moody().train()
    model.still.eval()
    fit(tmp_path / "b", model=model)
    assert set(model.modes) == {(True, False)}, "what a user keeps in eval() inside a model in train() stays so"
    assert [m.training for m in (model, model.still)] == [True, False]


class Cells(Llama):
    """With an expanded buffer and parameters of unusual layouts, drawn from no seed of the job's."""

    def __init__(self, seed: int) -> None:
        super().__init__(TINY)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("cells", torch.randn(1, 3, generator=generator).expand(4, 3))
        self.extra = nn.Parameter(torch.randn(8, 8, generator=generator)[:, ::2])
        self.frozen = nn.Parameter(torch.full((3,), seed, dtype=torch.uint16), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(input_ids, position_ids) + self.cells.sum() * self.extra.sum() * 1e-3


def celled(world: World, folder: Path) -> tuple[list[float], list[float], list[int]]:
    losses = []
    for steps in (2, 4):
        model = Cells(world.rank)
        losses += fit(folder, lambda m: (adamw(m), None), model, max_steps=steps, resume=steps > 2).losses
    return losses, [*model.cells.flatten().tolist(), *model.extra.flatten().tolist()], model.frozen.tolist()


def test_ranks_begin_and_resume_with_equal_tensors_of_any_layout(tmp_path: Path) -> None:
    several = run_ranks(2, celled, tmp_path / "2")
    assert several[0] == several[1]
    assert several[0][2] == [0, 0, 0]
    assert several[0][0] == pytest.approx(run_ranks(1, celled, tmp_path / "1")[0][0], rel=1e-5)


def test_data_without_labels_to_learn_from_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, data=[{"input_ids": s, "labels": [-100] * len(s)} for s in DATA], max_steps=1)
    assert "60 of the data's 60 sequences have no label to learn from" in capsys.readouterr().out


def test_unshifted_labels_train_what_plain_rows_train(tmp_path: Path) -> None:
    plain = fit(tmp_path / "a").losses
    copied = fit(tmp_path / "b", data=[{"input_ids": s, "labels": s} for s in DATA], labels="unshifted").losses
    padded = [
        {"input_ids": [0, 0, *s, 0], "labels": [0, 0, *s, 0], "attention_mask": [0, 0, *[1] * len(s), 0]} for s in DATA
    ]
    assert copied == plain
    assert fit(tmp_path / "c", data=padded, labels="unshifted").losses == plain
