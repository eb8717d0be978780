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
from heteromesh.runtime.records.checkpoint import Checkpoints, Shapes, step_directory
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
        shapes: Shapes | None = None,
        copied: bool = True,
        shares: bool = False,
    ) -> None:
        """`together`: the world of ranks that stay, which write a checkpoint each its part. `shapes`: of the
        whole model's parameters, where `model` has a part only. `every`: steps, 0: never but at the end. `keep`: older
        checkpoints are removed. `copied`: see `Checkpoints`. `shares`: members that come and go write each its
        part, while training waits."""
        self.run_dir, self.every = run_dir, every
        self._directory, self._keep = run_dir / CHECKPOINTS, keep
        self._model, self._state, self._trainer_state = model, state, trainer_state
        self._recorder, self._together, self._shapes = recorder, together, shapes
        self._checkpoints: Checkpoints | None = None
        self._copied, self._shares = copied, shares
        if together is not None:
            self._opened()

    def save(self, world: World, done: int, sampled: dict[str, Any]) -> None:
        """Starts to write the state after `done` steps. Raises UserError where the one before can't be written."""
        if self._shares:
            trainer = self._trainer_state(done, sampled)
            self._opened().save_shares(world, done, self._model, self._state, trainer)
            return
        if self._together is not None or world.writes:
            self._opened().save(done, self._model, self._state, self._trainer_state(done, sampled))

    def wait(self) -> None:
        """Returns when what this rank writes is whole. Raises UserError where it can't be written."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def resume(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
        """Loads the newest whole checkpoint into model and state owner; returns where it is and the trainer's state.

        `say` gets a line where newer ones are damaged. Raises UserError where none is whole.
        """
        path = self.newest(say)
        return path, self.load(path)

    def newest(self, say: Callable[[str], None]) -> Path:
        """Returns the newest whole checkpoint; says and raises as `resume`."""
        path, wrong = self._opened().newest_whole()
        damaged = "; ".join(wrong)
        if path is None:
            said = f": {damaged}; start anew in another one" if wrong else " to resume: start anew in another one"
            raise UserError(f"run directory {self.run_dir} has no whole checkpoint{said}")
        if wrong:
            say(f"{damaged}: going on from {path.name}, the newest one that is whole")
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Loads a checkpoint into model and state owner; returns the trainer's state."""
        return self._opened().load(path, self._model, self._state)

    def holds_any(self) -> bool:
        """Whether there is a checkpoint to resume from, whole or not; equal on ranks that write together."""
        return bool(self._together.once(self.latest) if self._together is not None else self.latest())

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint, as this rank sees the file system."""
        return self._opened().latest()

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
            self._checkpoints = Checkpoints(self._directory, world, self._keep, self._shapes, copied=self._copied)
        return self._checkpoints
