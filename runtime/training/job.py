"""What a user wants trained, as one value: model, data, optimizer and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.initial.weights import InitialWeights
from heteromesh.parallel.model.loss import Loss
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.engine.loss_scale import LossScale
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.records.plain import from_text, to_text
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Sampler

Settings = tuple[dict[str, Any], ...]
"""By group of an optimizer, what it was given: learning rate, betas, weight decay."""
_SCHEDULED = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
"""What schedules note in the groups for themselves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """The arguments of a `Trainer`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    reader: Reader
    sampler: Sampler
    data_fingerprint: str
    """Of the data's content, where it has one."""
    config: TrainerConfig
    given: Settings = ()
    """The optimizer's settings as this run was started with."""
    hooks: Sequence[Hook] = ()
    """The user's."""
    loss: Loss | None = None
    """The user's own."""
    initial: InitialWeights
    """Where the model's first weights come from."""

    def trainer_state(self, done: int, sampled: dict[str, Any], scale: LossScale | None = None) -> dict[str, Any]:
        """Returns what a checkpoint has beside model and optimizer. scale: of losses, if there is one."""
        return {
            "step": done,
            "sampler": sampled,
            "schedule": to_text(self.schedule.state_dict()) if self.schedule is not None else None,
            "schedule_type": _type_of(self.schedule),
            "optimizer": _as_json(self.given),
            "loss_scale": asdict(scale) if scale is not None else None,
        }

    def described(self) -> dict[str, Any]:
        """Returns the optimizer and its settings as this run was started with, for config.json."""
        return {"type": _type_of(self.optimizer), "schedule": _type_of(self.schedule), "groups": _as_json(self.given)}

    def load_trainer_state(self, state: dict[str, Any]) -> list[str]:
        """Takes what `trainer_state` gave, when the optimizer has been loaded; returns what is other than it was there.

        What the user has changed of the optimizer's settings counts from here on. Raises UserError for another data
        set, seed, batch size or schedule, and for another learning rate under a schedule, whose state has the old one.
        """
        self.sampler.load_state_dict(state["sampler"])
        saved, mine = state.get("schedule_type", _type_of(self.schedule)), _type_of(self.schedule)
        if saved != mine:
            raise UserError(
                f"the checkpoint was trained with {saved or 'no schedule'} and this run has {mine or 'none'}: give the "
                "same schedule, or start a new run in another run directory with these weights"
            )
        if self.schedule is not None:
            loaded = state["schedule"]
            self.schedule.load_state_dict(from_text(loaded) if isinstance(loaded, str) else loaded)
        return self._changed_settings(state.get("optimizer", ()))

    def _changed_settings(self, saved: Sequence[Mapping[str, Any]]) -> list[str]:
        told = []
        groups = zip(self.optimizer.param_groups, self.given, saved, strict=False)
        for number, (group, given, before) in enumerate(groups):
            for name, value in given.items():
                if name not in before or _as_json(value) == before[name]:
                    continue
                old = before[name]
                what = f"the optimizer's {name} (group {number}) is {value!r}, the checkpoint's run began with {old!r}"
                if name == "lr" and self.schedule is not None:
                    raise UserError(
                        f"{what}, and {_type_of(self.schedule)} goes on from the old one: resume with "
                        f"lr={before[name]!r}, "
                        "or start a new run in another run directory with these weights"
                    )
                group[name] = value
                told.append(f"{what}: {value!r} counts from here on")
        return told


def name_of(loss: Loss | None) -> str:
    """Returns what a loss is called, "" for none."""
    return "" if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__)


def settings_of(optimizer: torch.optim.Optimizer) -> Settings:
    """Returns an optimizer's settings that are plain values; of a schedule's rate the one that it began with."""
    found = []
    for group in optimizer.param_groups:
        plain = {k: v for k, v in group.items() if k not in ("params", *_SCHEDULED) and _is_plain(v)}
        if "initial_lr" in group and _is_plain(group["initial_lr"]):
            plain["lr"] = group["initial_lr"]
        found.append(plain)
    return tuple(found)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


def _type_of(schedule: object) -> str:
    return type(schedule).__name__ if schedule is not None else ""
