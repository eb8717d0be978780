"""Checkpoints: torch.distributed.checkpoint in the background, whole or not there at all, the last N kept.

A checkpoint is a directory `step-00000040` with the shards and `meta.json`. It is written as `step-00000040.part`
and renamed when every rank has written its share; a `.part` that a killed run left is removed at the next start. All
ranks must see the same file system.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.call import plain_name
from heteromesh.parallel.state.fragments import Piece
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.runtime.records.checkpoint_pieces import PieceLoadPlanner, PieceSavePlanner, Stored, stored_state

META = "meta.json"
# one process without a process group is what this module asks for when it says no_dist
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def step_directory(step: int) -> str:
    """Returns what the checkpoint after `step` updates is called."""
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints of one run directory. Every rank must make the same calls.

    whole: the model that a rank's model is a stage of; it is what checkpoints are of.
    """

    def __init__(self, directory: Path, world: World, keep: int, whole: nn.Module | None = None) -> None:
        self._directory, self._world, self._keep, self._model = directory, world, keep, whole
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-checkpoint")
        self._pending: Future[None] | None = None
        if world.rank == 0:
            for part in directory.glob("*.part"):
                shutil.rmtree(part)
        world.barrier()

    def save(self, step: int, model: nn.Module, owner: StateOwner, trainer: Mapping[str, Any]) -> None:
        """Starts writing the state after `step` updates; returns when it has been copied.

        Waits for an earlier checkpoint first, and raises UserError if that could not be written.
        """
        self.wait()
        with self._world.recorder.span("checkpoint copy", "checkpoint"):
            state = _copied(_state(model, owner))
        meta = {
            "schema": 1,
            "step": step,
            "parameters": _shapes(model if self._model is None else self._model),
            "trainer": dict(trainer),
        }
        self._pending = self._thread.submit(self._write, step, state, meta)

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is whole; raises UserError if it can't be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, then ends the writing thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint."""
        return max(self._whole(), default=None)

    def load(self, path: Path, model: nn.Module, owner: StateOwner) -> dict[str, Any]:
        """Restores model and optimizer; returns what `save` was given as `trainer`.

        Any number of ranks will do, whatever the number that saved it, and whether or not the optimizer was sharded.

        Raises UserError for a checkpoint that is incomplete or of another model.
        """
        meta = _read_meta(path)
        _compare(meta["parameters"], _shapes(model if self._model is None else self._model), path)
        try:
            stored = stored_state(path)
            buffers = owner.checkpoint_buffers({n: {k: v.metadata for k, v in e.items()} for n, e in stored.items()})
            pieces = _take_pieces(buffers, stored)
            state = {"model": get_model_state_dict(model), "optimizer": buffers}
            load(
                state,
                checkpoint_id=path,
                planner=PieceLoadPlanner(pieces),
                process_group=self._world.checkpoint,
                no_dist=self._world.size == 1,
            )
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"checkpoint {path} is incomplete or damaged ({_reason(error)}): "
                "remove it to resume from the one before, or start anew in another run directory"
            ) from error
        set_model_state_dict(model, state["model"])
        _put_pieces(state["optimizer"], stored, pieces)
        owner.load_entries(state["optimizer"], stored)
        trainer: dict[str, Any] = meta["trainer"]
        return trainer

    def _whole(self) -> list[Path]:
        return [p for p in self._directory.glob("step-*") if p.suffix != ".part" and p.is_dir()]

    def _write(self, step: int, state: dict[str, Any], meta: Mapping[str, Any]) -> None:
        final = self._directory / step_directory(step)
        part = final.with_name(final.name + ".part")
        try:
            with self._world.recorder.span("checkpoint write", "checkpoint"):
                save(
                    state,
                    checkpoint_id=part,
                    planner=PieceSavePlanner(),
                    process_group=self._world.checkpoint,
                    no_dist=self._world.size == 1,
                )
                if self._world.rank == 0:
                    (part / META).write_text(json.dumps(meta))
                    shutil.rmtree(final, ignore_errors=True)
                    part.rename(final)
                    for old in sorted(self._whole())[: -self._keep]:
                        shutil.rmtree(old)
        except (Exception, CheckpointException) as error:
            if self._world.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            inner = _innermost(error)
            # torch's archive writer says nothing but that its position is off when the disk took less than it gave
            if not isinstance(inner, OSError) and "inline_container" not in str(inner):
                raise
            latest = self.latest()
            kept = f"{latest.name} is kept" if latest else "there is none before it"
            raise UserError(
                f"the checkpoint of step {step} can't be written to {self._directory} ({_reason(error)}): "
                f"free disk space or mend the directory and resume; {kept}"
            ) from error


def _state(model: nn.Module, owner: StateOwner) -> dict[str, Any]:
    entries = owner.checkpoint_entries()  # first: it waits for parameters that are still on their way
    return {"model": get_model_state_dict(model), "optimizer": entries}


def _take_pieces(buffers: dict[str, Any], stored: Mapping[str, Mapping[str, Stored]]) -> dict[str, Piece]:
    """Takes the pieces, which torch can't load, out of the optimizer's buffers; returns them by their flat keys."""
    found = {}
    for name, entries in buffers["state"].items():
        for key in [key for key, value in entries.items() if isinstance(value, Piece)]:
            found[stored[name][key].flat] = entries.pop(key)
    return found


def _put_pieces(
    buffers: dict[str, Any], stored: Mapping[str, Mapping[str, Stored]], pieces: Mapping[str, Piece]
) -> None:
    """Puts them back."""
    for name, entries in stored.items():
        own = {key: pieces[entry.flat] for key, entry in entries.items() if entry.flat in pieces}
        if own:
            buffers["state"].setdefault(name, {}).update(own)


def _copied(value: Any) -> Any:
    """Returns a deep copy in host memory: training goes on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Piece):
        return value.copied()
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value)
    return value


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {plain_name(name): list(p.shape) for name, p in model.named_parameters()}


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text())
        _ = meta["parameters"], meta["trainer"], meta["step"]
        return meta
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {path} is incomplete ({META} is missing or damaged): "
            "remove it to resume from the one before, or start anew in another run directory"
        ) from error


def _compare(saved: Mapping[str, list[int]], mine: Mapping[str, list[int]], path: Path) -> None:
    for name in sorted(set(saved) | set(mine)):
        if saved.get(name) != mine.get(name):
            raise UserError(
                f"checkpoint {path} is of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{mine.get(name, 'absent')} here; build the model it was made from or use another run directory"
            )


def _innermost(error: BaseException) -> BaseException:
    """Returns what went wrong on the first rank that failed."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Returns the innermost message in one line."""
    inner = _innermost(error)
    text = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {text[-1][:200]}" if text else type(inner).__name__
