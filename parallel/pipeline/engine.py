"""Pipeline parallelism: a model in stages of unequal numbers of layers, 1F1B, replicas of the pipeline.

The schedule is torch.distributed.pipelining's Schedule1F1B (PipeDream-flush, arXiv 2104.04473, section 2.2.1).
Micro-batches are packs of whole sequences of natural length, so no two need be of one size, and pipelines need not run
equally many. The loss is the sum over the step's valid tokens divided by their number, whatever the cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.pipelining import Schedule1F1B

from heteromesh.comm.gradients.sum import GradientSum
from heteromesh.comm.replicas import join_pipeline
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.parallel.model.recompute import keep_activations, recompute_layers
from heteromesh.parallel.pipeline.cut import cut, embedding_of, find_layers, shared_parameters
from heteromesh.parallel.pipeline.stage import Boundary, MicroBatch, PackStage, StageModule, Work
from heteromesh.planner.plan import Step
from heteromesh.planner.stages.stages import Placement


class PassTensors(Protocol):
    """What a micro-batch feeds the model (runtime.batch.PassInput): tensors (1, n), and how many labels are valid."""

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def valid(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineResult:
    """What happened in a step, equal on every rank. The gradients are in the stage's parameters."""

    loss: float
    """Sum over the valid tokens of the step, divided by their number."""
    valid_tokens: int
    seconds: float
    """From the first forward to the last gradient sum, on the rank where that took longest."""
    busy_seconds: tuple[float, ...]
    """Per rank, in forwards and backwards without waiting for other stages."""
    non_finite: tuple[int, ...]
    """Indices into the step's batch of the sequences to blame when the loss is not finite."""

    def bubble(self, ranks: Sequence[int]) -> float:
        """The share of the step in which these ranks (a stage's) were not in a forward or backward."""
        return 1.0 - sum(self.busy_seconds[r] for r in ranks) / len(ranks) / self.seconds


class PipelineExecutor:
    """Executes steps on one pipeline stage per rank. Usable without `Trainer`:

        executor = PipelineExecutor(model, world, placement)
        optimizer = torch.optim.AdamW(executor.model.parameters())
        step = pack_step(lengths, placement, tokens=8192)
        result = executor.run(step, Reader(data).step_inputs(step, batch, executor.pipeline))
        optimizer.step()

    model: the whole model, the same on every rank (parallel/pipeline/cut.py says what can be cut); it may be dropped
    afterwards. `executor.model`: this rank's stage, on the world's device, under the whole model's parameter names.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        placement: Placement,
        *,
        autocast: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        _check(model, world, placement)
        points = [(a, a + s.layers) for a, s in zip(placement.first_layers, placement.stages, strict=True)]
        tied = shared_parameters(model, points) if len(points) > 1 else []
        stage = placement.stage_of(world.rank)
        self.world, self.placement, self.stage = world, placement, stage
        self.model = cut(model, *points[stage]).to(world.device)
        self._boundary = _boundary(model)
        self._module = StageModule(self.model, stage == len(points) - 1, self._boundary, autocast)
        self._recomputed = recompute_layers(find_layers(self.model)[1]) if checkpoint_activations else []
        self._groups = join_pipeline(world, [s.ranks for s in placement.stages])
        self.pipeline = self._groups.replica
        """Which of the placement's pipelines this rank is in."""
        self._partner = {0: len(points) - 1, len(points) - 1: 0}.get(stage)
        self._tied = tied if self._partner is not None else []
        self._gradients = GradientSum(self._groups.peers)
        self._gradients.attach(self.model.parameters())
        self._schedules: dict[int, tuple[PackStage, Schedule1F1B]] = {}
        self._valid = 1

    def close(self) -> None:
        """Takes the hooks off the model and gives the groups back. Every rank of the world must call this."""
        self._gradients.detach()
        keep_activations(self._recomputed)
        self.world.barrier()
        self._groups.close()

    def run(self, step: Step, inputs: Mapping[int, PassTensors], *, valid_tokens: int | None = None) -> PipelineResult:
        """Forward and backward of a step. Every rank of the world must call this with the same step.

        step: each pass is a micro-batch of the pipeline that its one rank names (`pack_step`). inputs: by position in
        the step, of this rank's pipeline. valid_tokens: of the whole step, where known; else they are added up first.
        The gradients of the step replace older ones.
        """
        mine = self._micro_batches(step, inputs)
        if valid_tokens is None:
            own = sum(inputs[position].valid for position in mine) if self.stage == 0 else 0
            valid_tokens = int(self.world.sum(torch.tensor([float(own)], dtype=torch.float64))[0])
        self._valid = max(1, valid_tokens)
        self._gradients.clear(self.model.parameters())
        work = Work(list(mine.values()), self.world.recorder, self._gradients.arm)
        start = time.perf_counter()
        if len(self.placement.stages) == 1:
            self._run_alone(work)
        elif mine:
            self._run_schedule(work)
        with self.world.recorder.span("gradient sum, exposed", "wait"):
            self._finish_gradients(bool(mine))
        return self._result(step, list(mine), work, time.perf_counter() - start, valid_tokens)

    def gradient_norm(self) -> float:
        """Euclidean norm of the whole model's gradient, on every rank, as one process would have it."""
        tied = set(self._tied) if self.stage else set()
        own = (p for p in self.model.parameters() if p.grad is not None and p not in tied)
        squares = [float(p.grad.double().square().sum()) for p in own if p.grad is not None]
        mean = sum(squares) / self._groups.peers.size
        return math.sqrt(float(self.world.sum(torch.tensor([mean], dtype=torch.float64))[0]))

    def _micro_batches(self, step: Step, inputs: Mapping[int, PassTensors]) -> dict[int, MicroBatch]:
        pipelines = len(self.placement.micro_batches)
        found = {}
        for position, plan in enumerate(step.passes):
            if len(plan.ranks) != 1 or plan.ranks[0] >= pipelines:
                raise UserError(
                    f"pass {position} of the step names {plan.ranks}: under a pipeline a pass is a micro-batch of one "
                    f"of the pipelines 0 to {pipelines - 1}; make the step with pack_step"
                )
            if plan.ranks[0] != self.pipeline:
                continue
            lengths = [step.batch[i] for i in plan.sequences]
            if not sum(lengths):
                continue
            context = prepare_pass(plan, lengths, self.world, (1.0,) * pipelines)
            given = inputs[position]
            tokens, positions, labels = (
                t.to(self.world.device, non_blocking=True) for t in (given.tokens, given.positions, given.labels)
            )
            found[position] = MicroBatch(context=context, tokens=tokens, positions=positions, labels=labels)
        return found

    def _run_alone(self, work: Work) -> None:
        for index in range(len(work.batches)):
            with work.forward(index) as batch:
                losses = self._module(batch.tokens, batch.positions, batch.labels)
            work.losses[index] = losses.detach()
            with work.backward(index):
                self._loss(losses).backward()

    def _run_schedule(self, work: Work) -> None:
        # the schedule refuses fewer micro-batches than stages: the stage does nothing for those that are missing
        count = max(len(work.batches), len(self.placement.stages))
        if count not in self._schedules:
            stage = PackStage(self._module, self._groups, self.world.device, self._boundary)
            self._schedules[count] = stage, Schedule1F1B(stage, count, self._loss, scale_grads=False)
        stage, schedule = self._schedules[count]
        stage.work = work
        schedule.step(target=torch.zeros(count), return_outputs=False)
        stage.work = None

    def _loss(self, losses: torch.Tensor | None, _target: Any = None) -> torch.Tensor:
        return torch.zeros(()) if losses is None else losses.sum() / self._valid

    def _finish_gradients(self, armed: bool) -> None:
        if self._groups.peers.size > 1:
            if not armed:
                self._gradients.arm()
            self._gradients.finish()
        for parameter in self._tied:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            assert self._partner is not None
            self._groups.add_partner(self.world, parameter.grad, self._partner)

    def _result(self, step: Step, positions: list[int], work: Work, seconds: float, valid: int) -> PipelineResult:
        """One vector summed over the world: loss, busy seconds of each rank, seconds of each rank."""
        size, rank = self.world.size, self.world.rank
        vector = torch.zeros(1 + 2 * size, dtype=torch.float64)
        vector[0] = sum(float(losses.double().sum()) for losses in work.losses.values())
        vector[1 + rank], vector[1 + size + rank] = work.busy_seconds, seconds
        numbers = self.world.sum(vector).tolist()
        loss = numbers[0] / max(1, valid)
        return PipelineResult(
            loss=loss,
            valid_tokens=valid,
            seconds=max(numbers[1 + size :]),
            busy_seconds=tuple(numbers[1 : 1 + size]),
            non_finite=() if math.isfinite(loss) else self._find_non_finite(step, positions, work),
        )

    def _find_non_finite(self, step: Step, positions: list[int], work: Work) -> tuple[int, ...]:
        found = []
        for index, losses in work.losses.items():
            sequences = step.passes[positions[index]].sequences
            for sequence, part in zip(sequences, losses.split([step.batch[i] for i in sequences]), strict=True):
                if not math.isfinite(float(part.sum())):
                    found.append(sequence)
        return tuple(sorted(sequence for own in self.world.gather(found) for sequence in own))


def _check(model: nn.Module, world: World, placement: Placement) -> None:
    count, stages = len(find_layers(model)[1]), placement.stages
    if placement.layers != count:
        raise UserError(
            f"the placement's {len(stages)} stages have {' + '.join(str(s.layers) for s in stages)} = "
            f"{placement.layers} layers and the model has {count}: make a placement for this model"
        )
    for index, stage in enumerate(stages):
        if stage.tensor_parallel > 1:
            raise UserError(
                f"stage {index} has tensor_parallel {stage.tensor_parallel} and the pipeline executor runs 1: make a "
                "placement with tensor_parallel 1"
            )
    ranks = sorted(rank for stage in stages for rank in stage.ranks)
    if ranks != list(range(world.size)):
        raise UserError(
            f"the placement has {len(ranks)} ranks, 0 to {ranks[-1]}, and the world {world.size}: start as many ranks "
            "as the placement has"
        )


def _boundary(model: nn.Module) -> Boundary:
    embedding = embedding_of(model)
    weight = next(embedding.parameters())
    with torch.no_grad():
        example = embedding(torch.zeros(1, 1, dtype=torch.long, device=weight.device))
    return Boundary(hidden=example.shape[-1], dtype=example.dtype)
