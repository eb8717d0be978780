"""The gradient exchange of a pipeline stage: sums over its replicas, and what all stages must know together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from heteromesh.comm.gradients.exchange import GradientExchange, Held, Members, Share, Summed
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.parallel.pipeline.engine import StageRunner


class StageExchange(GradientExchange):
    """Sums a stage's gradients over its replicas while its last backward runs; loss and tokens over all ranks.

    Gradients of tied weights are added over the two stages that hold them.
    """

    def __init__(self, runner: StageRunner) -> None:
        self._runner = runner
        self._reducer = GradientReducer(runner.model.parameters())
        self.buckets = self._reducer.buckets
        ends = {0: len(runner.placement.stages) - 1, len(runner.placement.stages) - 1: 0}
        self._partner = ends.get(runner.stage)
        self._world = runner.world

    def begin(self, step: int, world: World) -> None:
        self._world = world
        self._reducer.begin(step, self._runner.groups.peers)

    def held(self) -> Held:
        return self._reducer.held()

    def settle(self, held: Mapping[int, Held]) -> None:
        self._reducer.settle(held)

    @property
    def done(self) -> frozenset[int]:
        return self._reducer.done

    def share(self, members: Members, sequences: Sequence[int]) -> AbstractContextManager[Share]:
        return self._reducer.share(members, sequences)

    def last_backward(self) -> None:
        self._reducer.last_backward()

    def flush(self) -> None:
        self._reducer.flush()

    def finish(self) -> Summed:
        summed = self._reducer.finish()
        present = dict(summed.present)
        for parameter in self._runner.tied if self._partner is not None else ():
            self._runner.groups.add_partner(self._world, self._gradient(parameter, summed), self._partner or 0)
            present[parameter] = True
        # a stage's sum is known to each of its replicas
        own = torch.tensor([summed.loss, float(summed.valid)], dtype=torch.float64) / self._runner.groups.peers.size
        loss, valid = self._world.sum(own).tolist()
        return replace(summed, loss=loss, valid=round(valid), present=present)

    def committed(self) -> None:
        self._reducer.committed()

    def close(self) -> None:
        self._reducer.close()

    def _gradient(self, parameter: nn.Parameter, summed: Summed) -> torch.Tensor:
        """Returns where a parameter's gradient is, zeros where there is none."""
        if not summed.tensors:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            return parameter.grad
        return next(
            bucket.view(flat, index)
            for bucket, flat in zip(self.buckets, summed.tensors, strict=True)
            for index, other in enumerate(bucket.parameters)
            if other is parameter
        )
