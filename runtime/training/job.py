"""What a user wants trained, as one value: model, data, optimizer and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Sampler


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
    hooks: Sequence[Hook] = ()
    """The user's."""

    def trainer_state(self, done: int, sampled: dict[str, Any]) -> dict[str, Any]:
        """Returns what a checkpoint has beside model and optimizer."""
        schedule = self.schedule.state_dict() if self.schedule is not None else None
        return {"step": done, "sampler": sampled, "schedule": schedule}

    def load_trainer_state(self, state: dict[str, Any]) -> None:
        """Takes what `trainer_state` gave. Raises UserError for another data set, seed or batch size."""
        self.sampler.load_state_dict(state["sampler"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
