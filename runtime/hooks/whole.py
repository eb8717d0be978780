"""What ranks have of the trained model when all is done."""

from __future__ import annotations

from heteromesh.parallel.pipeline.engine import StageRunner
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.parallel.state.sharded_weights import ShardedWeights
from heteromesh.runtime.hooks.api import Hook, TrainingReport


class WholeStages(Hook):
    """Gives every rank the whole model that was trained in stages."""

    def __init__(self, state: StateOwner, runner: StageRunner) -> None:
        self._state, self._runner = state, runner

    def end(self, report: TrainingReport) -> None:
        self._state.weights_ready()
        self._runner.world.barrier()
        self._runner.groups.close()


class Settled(Hook):
    """Leaves every rank what is outside layers; the others' weights are on their owners, and in the checkpoint."""

    def __init__(self, state: ShardedWeights) -> None:
        self._state = state

    def end(self, report: TrainingReport) -> None:
        self._state.begin()


class Gathered(Hook):
    """Gives every rank the whole trained model."""

    def __init__(self, state: StateOwner) -> None:
        self._state = state

    def end(self, report: TrainingReport) -> None:
        self._state.weights_ready()
