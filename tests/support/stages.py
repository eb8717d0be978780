"""Pipeline stages without a trainer: placements, and the engine, exchange and owner of a stage put together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.parallel.pipeline.engine import StageRunner
from heteromesh.parallel.pipeline.exchange import StageExchange
from heteromesh.parallel.pipeline.owner import StageOwner
from heteromesh.planner.plan import Step
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.runtime.engine.api import NonFinite
from heteromesh.runtime.engine.pipeline import Pipeline
from heteromesh.runtime.work.reader import PassInput
from heteromesh.runtime.work.sampler import Batch
from heteromesh.runtime.work.source import Assignment


def simple(*layers: int, replicas: int = 1, micro_batches: int = 2) -> Placement:
    """Ranks 0, 1, ... stage by stage."""
    stages = (Stage(ranks=tuple(range(s * replicas, (s + 1) * replicas)), layers=n) for s, n in enumerate(layers))
    return Placement(stages=tuple(stages), micro_batches=(micro_batches,) * replicas)


@dataclass(frozen=True, kw_only=True)
class StagedResult:
    loss: float
    valid_tokens: int
    norm: float
    seconds: float
    busy_seconds: tuple[float, ...]
    non_finite: tuple[NonFinite, ...]


class StagedSteps:
    """Runs steps on this rank's stage; gradients are in the stage's parameters, clipped to `limit`, until `update`."""

    def __init__(
        self, model: nn.Module, world: World, placement: Placement, *, optimizer: torch.optim.Optimizer | None = None,
        checkpoint_activations: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.world = world
        self.runner = StageRunner(model, world, placement, checkpoint_activations=checkpoint_activations, seed=seed)
        self.model, self.entry, self.stage = self.runner.model, self.runner.entry, self.runner.stage
        self.engine, self.exchange = Pipeline(self.runner), StageExchange(self.runner)
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
        self.owner = StageOwner(optimizer, model, self.runner, self.exchange.buckets)
        self._number = 0

    def run(
        self, step: Step, inputs: Mapping[int, PassInput], *, limit: float = float("inf"), number: int = 0
    ) -> StagedResult:
        self._number += 1
        start = time.perf_counter()
        self.exchange.begin(self._number, self.world)
        measured = self.engine.run(self._assignment(step, inputs, number), self.world, self.exchange)
        summed = self.exchange.finish()
        seconds = time.perf_counter() - start
        norm = self.owner.take(summed, limit, self.world)
        everyone = self.world.gather((measured, seconds))
        self.exchange.committed()
        return StagedResult(
            loss=summed.loss / max(1, summed.valid),
            valid_tokens=summed.valid,
            norm=norm,
            seconds=max(took for _, took in everyone),
            busy_seconds=tuple(m.busy_seconds for m, _ in everyone),
            non_finite=tuple(n for m, _ in everyone for n in m.non_finite),
        )

    def close(self) -> None:
        self.owner.close()
        self.exchange.close()
        self.engine.close()
        self.world.barrier()
        self.runner.groups.close()

    def _assignment(self, step: Step, inputs: Mapping[int, PassInput], number: int) -> Assignment:
        places: Sequence[int] = range(len(step.batch))
        batch = Batch(index=0, epoch=0, sequences=tuple(places), lengths=step.batch, position=len(places))
        own = sum(i.valid for i in inputs.values()) if self.runner.is_last else 0
        valid = int(self.world.sum(torch.tensor([float(own)]))[0])
        return Assignment(
            number=number, batch=batch, places=tuple(places), step=step, inputs=inputs, divisor=max(1, valid)
        )
