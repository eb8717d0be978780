"""The Trainer: trains a model on sequences of every length, each step under a plan of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from heteromesh.comm.world import join_world
from heteromesh.errors import UserError
from heteromesh.parallel.initial.weights import InitialWeights
from heteromesh.parallel.model.loss import Loss
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.hooks.api import Hook, TrainingReport
from heteromesh.runtime.process.environment import COORDINATORS
from heteromesh.runtime.process.failure import RunFinished
from heteromesh.runtime.process.variables import DRY_RUN_VARIABLE
from heteromesh.runtime.training.build import described_cluster
from heteromesh.runtime.training.dry_run import dry_run
from heteromesh.runtime.training.elastic import ElasticJob
from heteromesh.runtime.training.fixed import FixedJob
from heteromesh.runtime.training.job import Job, settings_of
from heteromesh.runtime.training.job_check import in_training
from heteromesh.runtime.work.reader import Reader, Sequences
from heteromesh.runtime.work.sampler import Sampler


class Trainer:
    """Trains `model` on `data` as `config` says. `fit()` does all of it.

    model: an nn.Module as `StepExecutor` takes it; one in eval() is trained in train() and put back at the end, modules
    that are in eval() inside a model in train() stay so. data: `data[i]` is a 1-D sequence of token ids, or a mapping
    with `input_ids`, `labels` (`TrainerConfig.labels` says of which kind) and perhaps `attention_mask`, whose padded
    ends are cut off; a `TokenStore` is read in part. optimizer: any torch optimizer over the model's parameters; None:
    AdamW. schedule: a learning-rate schedule of that optimizer, stepped once a step. hooks: called after steps, for
    evaluations, checkpoints and at the end (`Hook`). loss: of your own, `loss(outputs, batch)`, in place of the next
    token's cross-entropy (docs/losses.md): for classification, pairs, weights by token. weights: a folder or file of
    safetensors that training begins with, in place of the model's own. Parameters of the model may be on the meta
    device, for models that fit no rank (docs/sharded-weights.md): without files they are initialised at random.

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
        hooks: Sequence[Hook] = (),
        loss: Loss | None = None,
        weights: str | Path | None = None,
    ) -> None:
        self.model, self.config, self.schedule, self.hooks = model, config, schedule, tuple(hooks)
        self.loss = loss
        self._weights = weights
        self._initial: InitialWeights | None = None
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        self.data, self.reader = data, Reader(data, config.labels, examples=loss is not None)
        self.sampler = Sampler(self.reader.lengths, batch_tokens=config.batch_tokens, seed=config.seed)

    def fit(self) -> TrainingReport:
        """Trains until `max_steps`; returns what happened, equal on every rank.

        Raises UserError for bad input, for a loss that is not finite (the last whole checkpoint stays) and for a hook
        that raised (the run is saved), and SystemExit(128 + signal) after Ctrl-C or SIGTERM, when the state has been
        saved. With fault tolerance it ends a process that was started again after the end with SystemExit(0).
        Under `heteromesh run --dry-run` it prints the plan of the first steps and ends with SystemExit(0).
        """
        job = self._job()
        with in_training(self.model):
            return self._fit(job)

    def _fit(self, job: Job) -> TrainingReport:
        if DRY_RUN_VARIABLE in os.environ:
            dry_run(job)
            raise SystemExit(0)
        with ExitStack() as stack:
            # a process that nothing has launched is a job of its own
            if self.config.fault_tolerance and (COORDINATORS in os.environ or "WORLD_SIZE" in os.environ):
                try:
                    report = ElasticJob(job, stack).run()
                except RunFinished as finished:
                    print(f"heteromesh: {finished}: this process, started again, has nothing to do", file=sys.stderr)
                    raise SystemExit(0) from None
            else:
                timeout = timedelta(seconds=self.config.timeout_seconds)
                world = stack.enter_context(join_world(timeout, described_cluster(self.config)))
                report = FixedJob(job, world, stack).run()
        if report.signal is not None:
            raise SystemExit(128 + report.signal)
        return report

    def _job(self) -> Job:
        # once: a second fit goes on with what the first one has trained
        if self._initial is None:
            files = Path(self._weights) if self._weights is not None else None
            self._initial = InitialWeights(self.model, files, self.config.seed)
        elif self._initial.tried:
            raise UserError(
                "this model began on the meta device and its weights have been dealt out by the fit() before: build "
                "model, optimizer and Trainer anew (resume=True goes on from the last checkpoint)"
            )
        return Job(
            initial=self._initial,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            reader=self.reader,
            sampler=self.sampler,
            data_fingerprint=getattr(self.data, "fingerprint", ""),
            config=self.config,
            given=settings_of(self.optimizer),
            hooks=self.hooks,
            loss=self.loss,
        )
