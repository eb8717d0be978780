"""Who writes a job's checkpoints: all ranks together where they stay, else the one that has been there for longest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from heteromesh.comm.records import Recorder
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.runtime.records.checkpoint import Checkpoints, step_directory
from heteromesh.runtime.records.rundir import CHECKPOINTS


class CheckpointWriter:
    """Writes and reads the checkpoints of a run directory, which must be the same file system on every host."""

    def __init__(
        self,
        run_dir: Path,
        model: nn.Module,
        state: StateOwner,
        trainer_state: Callable[[int, dict[str, Any]], dict[str, Any]],
        recorder: Recorder,
        *,
        every: int,
        keep: int,
        together: World | None,
        whole: nn.Module | None = None,
    ) -> None:
        """`together`: the world of ranks that stay, which write a checkpoint each its part. `whole`: the model that
        `model` is a stage of. `every`: steps, 0: never but at the end. `keep`: older checkpoints are removed."""
        self.run_dir, self.every = run_dir, every
        self._directory, self._keep = run_dir / CHECKPOINTS, keep
        self._model, self._state, self._trainer_state = model, state, trainer_state
        self._recorder, self._together, self._whole = recorder, together, whole
        self._checkpoints: Checkpoints | None = None
        if together is not None:
            self._opened()

    def save(self, world: World, done: int, sampled: dict[str, Any]) -> None:
        """Starts to write the state after `done` steps. Raises UserError where the one before can't be written."""
        if self._together is not None or world.writes:
            self._opened().save(done, self._model, self._state, self._trainer_state(done, sampled))

    def wait(self) -> None:
        """Returns when what this rank writes is whole. Raises UserError where it can't be written."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def resume(self) -> tuple[Path, dict[str, Any]]:
        """Loads the newest whole checkpoint into model and state owner; returns where it is and the trainer's state.

        Raises UserError where there is none.
        """
        checkpoints = self._opened()
        path: Path | None = (
            self._together.once(checkpoints.latest) if self._together is not None else checkpoints.latest()
        )
        if path is None:
            raise UserError(
                f"run directory {self.run_dir} has no whole checkpoint to resume: start anew in another one"
            )
        loaded = checkpoints.load(path, self._model, self._state)
        if self._together is None:
            self.close()
        return path, loaded

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint, as this rank sees the file system."""
        return max(self._directory.glob("step-*[0-9]"), default=None)

    def path_of(self, done: int) -> Path:
        """Returns where the checkpoint after `done` steps is or will be."""
        return self._directory / step_directory(done)

    def close(self) -> None:
        """Waits for the checkpoint under way."""
        checkpoints, self._checkpoints = self._checkpoints, None
        if checkpoints is not None:
            checkpoints.close()

    def _opened(self) -> Checkpoints:
        if self._checkpoints is None:
            world = self._together or World(recorder=self._recorder)
            self._checkpoints = Checkpoints(self._directory, world, self._keep, self._whole)
        return self._checkpoints
