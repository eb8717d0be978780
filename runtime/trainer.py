"""The Trainer: trains a model on sequences of every length, each step under a plan of its own."""

from __future__ import annotations

import os
from contextlib import ExitStack
from datetime import timedelta

import torch
from torch import nn

from heteromesh.comm.world import join_world
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.process.environment import COORDINATORS
from heteromesh.runtime.training.build import DRY_RUN_VARIABLE, described_cluster
from heteromesh.runtime.training.dry_run import dry_run
from heteromesh.runtime.training.loop import TrainingLoop, TrainingReport
from heteromesh.runtime.training.loop2 import ElasticLoop
from heteromesh.runtime.work.reader import Reader, Sequences
from heteromesh.runtime.work.sampler import Sampler


class Trainer:
    """Trains `model` on `data` as `config` says. `fit()` does all of it.

    model: an nn.Module as `StepExecutor` takes it. data: `data[i]` is a 1-D sequence of token ids (or a mapping with
    `input_ids` and `labels`); a `TokenStore` is read in part. optimizer: any torch optimizer over the model's
    parameters; None: AdamW. schedule: a learning-rate schedule of that optimizer, stepped once a step.

    Works in one process, under `heteromesh run` and under plain torchrun.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        data: Sequences,
        config: TrainerConfig,
        *,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        self.model, self.config, self.schedule = model, config, schedule
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        self.data, self.reader = data, Reader(data)
        self.sampler = Sampler(self.reader.lengths, batch_tokens=config.batch_tokens, seed=config.seed)

    def fit(self) -> TrainingReport:
        """Trains until `max_steps`; returns what happened, equal on every rank.

        Raises UserError for bad input and for a loss that is not finite (the last whole checkpoint stays), and
        SystemExit(128 + signal) after Ctrl-C or SIGTERM, when the state has been saved. Under
        `heteromesh run --dry-run` it prints the plan of the first steps and ends the process with SystemExit(0).
        """
        if DRY_RUN_VARIABLE in os.environ:
            dry_run(self)
            raise SystemExit(0)
        with ExitStack() as stack:
            # a process that nothing has launched is a job of its own
            if self.config.fault_tolerance and (COORDINATORS in os.environ or "WORLD_SIZE" in os.environ):
                report = ElasticLoop(self, stack).run()
            else:
                timeout = timedelta(seconds=self.config.timeout_seconds)
                world = stack.enter_context(join_world(timeout, described_cluster(self.config)))
                report = TrainingLoop(self, world, stack).run()
        if report.signal is not None:
            raise SystemExit(128 + report.signal)
        return report
