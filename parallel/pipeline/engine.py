"""One rank's pipeline stage: its part of the model, its place among the stages, and 1F1B over micro-batches.

The schedule is torch.distributed.pipelining's Schedule1F1B (PipeDream-flush, arXiv 2104.04473, section 2.2.1).
Micro-batches are packs of whole sequences of natural length, so no two need be of one size, and pipelines need not run
equally many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import Schedule1F1B

from heteromesh.comm.replicas import join_pipeline
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.dropout import dropouts_replaced
from heteromesh.parallel.model.randomness import PassRandomness
from heteromesh.parallel.model.recompute import keep_activations, recompute_layers
from heteromesh.parallel.pipeline.cut import LAYERS, cut, embedding_of, find_layers, shared_parameters
from heteromesh.parallel.pipeline.stage import Boundary, MicroBatch, MicroBatchWork, PackStage, StageModule
from heteromesh.planner.stages.stages import Placement


class StageRunner:
    """This rank's stage of a model that is the same on every rank (parallel/pipeline/cut.py says what can be cut).

    `model`: the stage, on the world's device, under the whole model's parameter names; it shares them with the model.
    Raises UserError for a placement that does not fit the model or the world. Every rank of the world must make one.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        placement: Placement,
        *,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        check_placement(model, placement, world.size)
        points = placement.points
        self.stage = placement.stage_of(world.rank)
        first, last = points[self.stage]
        self.world, self.placement, self._seed = world, placement, seed
        self.tied = shared_parameters(model, points) if len(points) > 1 else []
        """What the first and the last stage share, whichever this is; [] for nothing."""
        self.model = cut(model, first, last).to(world.device)
        self._boundary = boundary_of(model)
        self._module = StageModule(self.model, self.is_last, self._boundary, autocast)
        self._recomputed = recompute_layers(find_layers(self.model)[1]) if checkpoint_activations else []
        self._randomness = stage_randomness(self.model, first, self.is_last)
        self.groups = join_pipeline(world, [s.ranks for s in placement.stages])
        self.pipeline = tuple(stage.ranks[self.groups.replica] for stage in placement.stages)
        """The ranks that this rank's micro-batches go through, stage by stage."""
        self.entry = self.pipeline[0]
        """Micro-batches are named by it."""
        self._schedules: dict[int, tuple[PackStage, Schedule1F1B]] = {}
        self._divisor = 1.0

    @property
    def is_last(self) -> bool:
        """Whether the losses are this stage's."""
        return self.stage == len(self.placement.stages) - 1

    def close(self) -> None:
        """Takes its hooks off the model. The communicators end with the job's."""
        self._randomness.close()
        keep_activations(self._recomputed)

    def run(
        self, batches: Sequence[MicroBatch], number: int, divisor: float, before_last_backward: Callable[[], None]
    ) -> MicroBatchWork:
        """Runs forward and backward of the micro-batches of step `number`; every rank of the pipeline must call it.

        The gradient added to the stage's parameters is that of the losses' sum divided by `divisor`.
        """
        self._divisor = divisor
        work = MicroBatchWork(
            batches,
            self.world.recorder,
            before_last_backward,
            lambda batch: self._randomness.during(self._seed, number, batch.places),
        )
        # what is recomputed in a backward draws too
        with dropouts_replaced():
            if len(self.placement.stages) == 1:
                self._run_alone(work)
            elif batches:
                self._run_schedule(work)
        return work

    def _run_alone(self, work: MicroBatchWork) -> None:
        for index in range(len(work.batches)):
            with work.forward(index) as batch:
                losses = self._module(batch.tokens, batch.positions, batch.labels)
            work.losses[index], work.outputs[index] = losses.detach(), losses
            with work.backward(index):
                self._loss(losses).backward()

    def _run_schedule(self, work: MicroBatchWork) -> None:
        # the schedule refuses fewer micro-batches than stages: the stage does nothing for those that are missing
        count = max(len(work.batches), len(self.placement.stages))
        if count not in self._schedules:
            stage = PackStage(self._module, self.groups, self.world.device, self._boundary)
            self._schedules[count] = stage, Schedule1F1B(stage, count, self._loss, scale_grads=False)
        stage, schedule = self._schedules[count]
        stage.work = work
        schedule.step(target=torch.zeros(count), return_outputs=False)
        stage.work = None

    def _loss(self, losses: torch.Tensor | None, _target: Any = None) -> torch.Tensor:
        return torch.zeros(()) if losses is None else losses.sum() / self._divisor


def check_placement(model: nn.Module, placement: Placement, ranks: int) -> None:
    """Raises UserError where a placement does not fit the model or the number of ranks."""
    count, stages = len(find_layers(model)[1]), placement.stages
    if placement.layers != count:
        raise UserError(
            f"the placement's {len(stages)} stages have {' + '.join(str(s.layers) for s in stages)} = "
            f"{placement.layers} layers and the model has {count}: make a placement for this model"
        )
    for index, stage in enumerate(stages):
        if stage.tensor_parallel > 1:
            raise UserError(
                f"stage {index} has tensor_parallel {stage.tensor_parallel} and stages are run with 1: make a "
                "placement with tensor_parallel 1"
            )
    named = sorted(rank for stage in stages for rank in stage.ranks)
    if named != list(range(ranks)):
        raise UserError(
            f"the placement has {len(named)} ranks, 0 to {named[-1]}, and the job {ranks}: start as many ranks "
            "as the placement has"
        )


def boundary_of(model: nn.Module) -> Boundary:
    """Returns what travels between the stages of a whole model."""
    embedding = embedding_of(model)
    weight = next(embedding.parameters())
    with torch.no_grad():
        example = embedding(torch.zeros(1, 1, dtype=torch.long, device=weight.device))
    return Boundary(hidden=example.shape[-1], dtype=example.dtype)


def stage_randomness(stage: nn.Module, first: int, is_last: bool) -> PassRandomness:
    """Returns the random numbers of a stage that begins with layer `first` of the model."""
    before = ".".join([*find_layers(stage)[0], LAYERS, str(first - 1)]) if first else None
    return PassRandomness(stage, follows=before, ends=is_last)
