"""Checkpoints: torch.distributed.checkpoint in the background, whole or not there at all, the last N kept.

A checkpoint is a directory `step-00000040` (runtime/records/checkpoint_files.py says how it is written). All ranks must
see the same file system. Whoever only reads changes nothing there; the one that writes removes what is left over.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.call import plain_name
from heteromesh.parallel.state.fragments import Piece
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.runtime.records.checkpoint_files import (
    PART,
    MetadataReader,
    PartWriter,
    Superseded,
    damage,
    read_meta,
    remove,
    remove_parts,
)
from heteromesh.runtime.records.checkpoint_pieces import (
    PieceLoadPlanner,
    PieceSavePlanner,
    Stored,
    stored_state,
    stored_weights,
)
from heteromesh.runtime.records.checkpoint_shares import Digests, SharePlanner, ShareWriter, share_of

# one process without a process group is what this module asks for when it says no_dist
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def step_directory(step: int) -> str:
    """Returns what the checkpoint after `step` updates is called."""
    return f"step-{step:08d}"


Shapes = dict[str, list[int]]
"""By name of a parameter."""


class Checkpoints:
    """The checkpoints of one run directory. Every rank must make the same calls.

    shapes: of the parameters of the whole model, where a rank has a part of it only (`shapes_of`).
    """

    def __init__(
        self, directory: Path, world: World, keep: int, shapes: Shapes | None = None, *, copied: bool = True
    ) -> None:
        """copied: whether training goes on, on other values, while a copy is written; else it waits."""
        self._directory, self._world, self._keep, self._shapes = directory, world, keep, shapes
        self._copy = copied
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-checkpoint")
        self._pending: Future[None] | None = None
        self._token: str = world.once(lambda: secrets.token_hex(4))
        """Of this writer's unfinished checkpoints: one that has taken over for it uses other names."""
        self._cleaned = False
        self._good: set[str] = set()
        """Checkpoints that this process has written or checked."""

    def save(self, step: int, model: nn.Module, owner: StateOwner, trainer: Mapping[str, Any]) -> None:
        """Starts writing the state after `step` updates; returns when it has been copied, or else written.

        Waits for an earlier checkpoint first. Raises UserError for one that could not be written.
        """
        self.wait()
        with self._world.recorder.span("checkpoint copy", "checkpoint"):
            state = _state(model, owner)
            state = _copied(state) if self._copy else state
        self._pending = self._thread.submit(self._write, step, state, self._meta(step, model, trainer))
        if not self._copy:
            self.wait()

    def save_shares(
        self, world: World, step: int, model: nn.Module, owner: StateOwner, trainer: Mapping[str, Any]
    ) -> None:
        """Writes the state after `step` updates, every member of the world its share; returns when it is whole.

        Inside an attempt. Raises UserError, on all members, where one can't write.
        """
        first, final = world.writes, self._directory / step_directory(step)
        part = final.with_name(world.once(lambda: self._fresh_part(final.name)))
        writer = ShareWriter(part, final, self._meta(step, model, trainer), rank=world.rank, first=first)
        try:
            with self._world.recorder.span("checkpoint write", "checkpoint"):
                told = world.gather(self._written(writer, share_of(_state(model, owner), first=first), step))
                if wrong := next((failed for failed, _ in told if failed), ""):
                    raise UserError(wrong)
                world.once(lambda: writer.complete([digests for _, digests in told]))
            if first:
                self._prune(final.name)
        finally:
            writer.close()

    def _fresh_part(self, name: str) -> str:
        """Returns the name of a folder that nobody else writes to, not even members of an attempt before."""
        if not self._cleaned:
            self._cleaned = True
            remove_parts(self._directory)
        return f"{name}.{secrets.token_hex(4)}{PART}"

    def _written(self, writer: ShareWriter, share: dict[str, Any], step: int) -> tuple[str, Digests]:
        """Writes this member's share; returns what went wrong, if anything, and its files' digests."""
        try:
            save(share, storage_writer=writer, planner=SharePlanner(), no_dist=True, use_collectives=False)
        except (Exception, CheckpointException) as error:
            if writer.superseded:
                raise Superseded(
                    f"{writer.path} was removed while this rank wrote it: another one writes now"
                ) from error
            try:
                self._refuse(step, error)
            except UserError as told:
                return str(told), []
            raise
        return "", writer.digests

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
        """Returns the newest checkpoint that was whole when it was written."""
        return max(self._whole(), default=None)

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """Returns the newest checkpoint whose files are as they were written, and what is wrong with newer ones.

        The ranks read a share of the files each. Those of before digests were kept are taken as they are.
        """
        names: list[str] = self._world.once(lambda: [path.name for path in sorted(self._whole(), reverse=True)])
        wrong: list[str] = []
        for name in names:
            found = self._world.gather(damage(self._directory / name, self._world.rank, self._world.size))
            if not any(found):
                self._good.add(name)
                return self._directory / name, wrong
            if self._world.once((self._directory / name).is_dir):  # not removed meanwhile, as an old one
                wrong.append(f"checkpoint {name} is damaged ({next(filter(None, found))})")
        return None, wrong

    def load(self, path: Path, model: nn.Module, owner: StateOwner) -> dict[str, Any]:
        """Restores model and optimizer; returns what `save` was given as `trainer`.

        Any number of ranks will do, whatever the number that saved it, and whether or not the optimizer was sharded.

        Raises UserError for a checkpoint that is incomplete or of another model.
        """
        meta = read_meta(path)
        _compare(meta["parameters"], self._shapes or shapes_of(model), path)
        try:
            stored = stored_state(path)
            buffers = owner.checkpoint_buffers({n: {k: v.metadata for k, v in e.items()} for n, e in stored.items()})
            weights = owner.model_entries(model)
            sharded = _take_weights(weights, path)
            pieces = _take_pieces(buffers, stored) | sharded
            state = {"model": weights, "optimizer": buffers}
            load(
                state,
                storage_reader=MetadataReader(path),
                planner=PieceLoadPlanner(pieces),
                process_group=self._world.checkpoint,
                no_dist=self._world.size == 1,
            )
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"checkpoint {path} is incomplete or damaged ({_reason(error)}): "
                "remove it to resume from the one before, or start anew in another run directory"
            ) from error
        # pieces are in their owner's memory already
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not sharded))
        _put_pieces(state["optimizer"], stored, pieces)
        owner.load_entries(state["optimizer"], stored)
        trainer: dict[str, Any] = meta["trainer"]
        return trainer

    def _meta(self, step: int, model: nn.Module, trainer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "schema": 2,
            "step": step,
            "parameters": self._shapes or shapes_of(model),
            "trainer": dict(trainer),
        }

    def _whole(self) -> list[Path]:
        return [p for p in self._directory.glob("step-*") if p.suffix != PART and p.is_dir()]

    def _write(self, step: int, state: dict[str, Any], meta: Mapping[str, Any]) -> None:
        final, first = self._directory / step_directory(step), self._world.rank == 0
        part = final.with_name(f"{final.name}.{self._token}{PART}")
        writer = PartWriter(part, final, meta, first=first)
        if first and not self._cleaned:
            self._cleaned = True
            remove_parts(self._directory)
        try:
            with self._world.recorder.span("checkpoint write", "checkpoint"):
                save(
                    state,
                    storage_writer=writer,
                    planner=PieceSavePlanner(),
                    process_group=self._world.checkpoint,
                    no_dist=self._world.size == 1,
                )
            if first:
                self._prune(final.name)
        except (Exception, CheckpointException) as error:
            if writer.superseded:
                raise Superseded(f"{part.name} was removed while this rank wrote it: another one writes now") from error
            self._refuse(step, error)
            raise
        finally:
            writer.close()

    def _prune(self, written: str) -> None:
        """Removes what is older than the last N checkpoints that this process knows to be whole."""
        whole = sorted(self._whole())
        self._good.add(written)
        good = [path for path in whole if path.name in self._good]
        if len(good) >= self._keep:
            for old in whole[: whole.index(good[-self._keep])]:
                remove(old)

    def _refuse(self, step: int, error: BaseException) -> None:
        """Raises UserError where the disk is at fault."""
        inner = _innermost(error)
        short = "inline_container" in str(inner) or "unexpected pos" in str(inner)
        if not isinstance(inner, OSError) and not short:
            return
        # torch's archive writer says nothing but that its position is off when the disk took less than it gave
        reason = "the disk took fewer bytes than it was given, as a full one does" if short else _reason(error)
        latest = self.latest()
        kept = f"{latest.name} is kept" if latest else "there is none before it"
        raise UserError(
            f"the checkpoint of step {step} can't be written to {self._directory} ({reason}): "
            f"free disk space or mend the directory and resume; {kept}"
        ) from error


def _state(model: nn.Module, owner: StateOwner) -> dict[str, Any]:
    entries = owner.checkpoint_entries()  # first: it waits for parameters that are still on their way
    return {"model": owner.model_entries(model), "optimizer": entries}


def _take_pieces(buffers: dict[str, Any], stored: Mapping[str, Mapping[str, Stored]]) -> dict[str, Piece]:
    """Takes the pieces, which torch can't load, out of the optimizer's buffers; returns them by their flat keys."""
    found = {}
    for name, entries in buffers["state"].items():
        for key in [key for key, value in entries.items() if isinstance(value, Piece)]:
            found[stored[name][key].flat] = entries.pop(key)
    return found


def _take_weights(weights: dict[str, Any], path: Path) -> dict[str, Piece]:
    """Does the same with a model's weights. Raises KeyError where the checkpoint has no such tensor."""
    names = [name for name, value in weights.items() if isinstance(value, Piece)]
    flat = stored_weights(path) if names else {}
    return {flat[name]: weights.pop(name) for name in names}


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


def shapes_of(model: nn.Module) -> Shapes:
    """Returns the parameters' shapes by name, while they have them: weights may be elsewhere later."""
    return {plain_name(name): list(p.shape) for name, p in model.named_parameters()}


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
