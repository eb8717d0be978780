"""Who owns the optimizer's state and applies the summed gradients: one interface, whoever holds how much of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.world import World

StoredState = Mapping[str, Mapping[str, Any]]
"""By parameter name and key, torch's metadata of what a checkpoint has of optimizer state."""


class StateOwner(Protocol):
    """What a training loop asks of the optimizer's state, wherever it is.

    What it does depends on nothing but what was committed and on the world: all ranks make the same calls.
    """

    def weights_ready(self) -> None:
        """Returns when all parameters are up to date on this rank."""
        return

    def refresh(self, world: World) -> str:
        """Brings all parameters up to date on all ranks; returns a digest of them, "" where they are so anyway.

        Inside an attempt: raises GroupAborted, and is called again in the next epoch.
        """

    def apply(self, summed: Summed, limit: float) -> float:
        """Does `take` and, where the norm is finite, `update`; returns the norm. For a world that stays."""

    def copy_sums(self, summed: Summed, world: World) -> str:
        """Brings sums to other ranks that need them, and what `take` must know of theirs; returns a digest.

        Inside an attempt, whose sums `take` is given then.
        """
        return ""

    def take(self, summed: Summed, limit: float, world: World) -> float:
        """Hands the gradients out, scaled so that their norm over all ranks is at most `limit`.

        Returns the norm before, equal on every rank. May be called again with other sums before `update`. The sums'
        memory belongs to the state owner from here on.
        """

    def update(self) -> None:
        """Lets the optimizer make its step, and drops the gradients."""

    def skip(self) -> None:
        """Drops what `take` was given, in place of `update`: weights and state stay as they are."""

    def is_settled(self, world: World) -> bool:
        """Whether the state lies as it should for these members."""
        return True

    def reshard(self, world: World, speeds: Sequence[float]) -> str:
        """Prepares that the members (by rank, of these speeds) hold the state; returns a digest. Inside an attempt."""
        return ""

    def finish_reshard(self) -> None:
        """Completes what was prepared, when that attempt was committed."""
        return

    def gathered(self, world: World) -> AbstractContextManager[None]:
        """Returns a context in which the rank that writes has all parameters and the whole state, for a checkpoint.

        Entered inside an attempt.
        """

    def snapshot(self) -> Any:
        """Returns plain values and CPU tensors, for a member that joins."""

    def model_snapshot(self, model: nn.Module) -> dict[str, Any]:
        """Returns what such a member must be given of the model, by name."""
        return dict(model.state_dict())

    def adopt(self, state: Any) -> None:
        """Takes another member's snapshot."""

    def model_entries(self, model: nn.Module) -> dict[str, Any]:
        """Returns what a checkpoint has of the model, by name; `Piece` where a part of a tensor is here.

        What is loaded into the pieces is in the weights when `load_entries` has been called.
        """
        return dict(get_model_state_dict(model))

    def checkpoint_entries(self) -> dict[str, Any]:
        """Returns "state" (by parameter name) and "param_groups"; `Piece` where a part of a tensor is here."""

    def checkpoint_buffers(self, stored: StoredState) -> dict[str, Any]:
        """Returns the same with buffers for what a checkpoint has."""

    def load_entries(self, entries: dict[str, Any], stored: StoredState) -> None:
        """Takes what has been loaded into `checkpoint_buffers`."""

    def take_exposed_seconds(self) -> float:
        """Returns how long this rank has waited for parameters since the last call."""

    def close(self) -> None:
        """Leaves the optimizer with the model's whole parameters."""
        return


class Replicated(StateOwner):
    """The whole state on every rank: each makes the same update."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, buckets: Sequence[Bucket] = ()) -> None:
        """buckets: of the gradients; not used where these stay on the parameters (one rank alone)."""
        self._optimizer, self._model, self._buckets = optimizer, model, tuple(buckets)

    def refresh(self, world: World) -> str:
        return ""

    def apply(self, summed: Summed, limit: float) -> float:
        norm = self.take(summed, limit, World())
        if math.isfinite(norm):
            self.update()
        return norm

    def take(self, summed: Summed, limit: float, world: World) -> float:
        if summed.tensors:
            scale_in(summed)
            norm = clip_whole(summed, self._buckets, limit)
            hand_out(summed, self._buckets)
            return norm
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        scale_in(summed, [p.grad for p in parameters if p.grad is not None])
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def update(self) -> None:
        self._optimizer.step()
        self.skip()

    def skip(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None

    @contextmanager
    def gathered(self, world: World) -> Iterator[None]:
        yield

    def snapshot(self) -> Any:
        return self._optimizer.state_dict()

    def adopt(self, state: Any) -> None:
        self._optimizer.load_state_dict(state)

    def checkpoint_entries(self) -> dict[str, Any]:
        return dict(get_optimizer_state_dict(self._model, self._optimizer))

    def checkpoint_buffers(self, stored: StoredState) -> dict[str, Any]:
        """Clears what is not whole: torch makes buffers only in an optimizer without any state and gradients."""
        trained = (p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad)
        if any(p not in self._optimizer.state for p in trained):
            self._optimizer.state.clear()
            self._optimizer.zero_grad()
        return self.checkpoint_entries()

    def load_entries(self, entries: dict[str, Any], stored: StoredState) -> None:
        """Loads what is there: a parameter that never had a gradient has no state, hence not strict."""
        state = {name: values for name, values in entries["state"].items() if name in stored}
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(self._model, self._optimizer, entries | {"state": state}, options=options)

    def take_exposed_seconds(self) -> float:
        return 0.0


def scale_in(summed: Summed, tensors: Sequence[torch.Tensor] | None = None) -> None:
    """Multiplies the sums (or tensors that hold them) by their scale, in place."""
    if summed.scale != 1.0:
        for tensor in summed.tensors if tensors is None else tensors:
            tensor.mul_(summed.scale)


def clip_whole(summed: Summed, buckets: Sequence[Bucket], limit: float) -> float:
    """Scales whole sums, in place, so that their norm is at most `limit`; returns the norm before."""
    hand_out(summed, buckets)
    parameters = [p for bucket in buckets for p in bucket.parameters if p.grad is not None]
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    for parameter in parameters:
        parameter.grad = None
    return norm


def hand_out(summed: Summed, buckets: Sequence[Bucket]) -> None:
    """Makes whole sums of buckets the gradients of their parameters, as views."""
    for bucket, flat in zip(buckets, summed.tensors, strict=True):
        for parameter, (start, stop) in zip(bucket.parameters, pairwise(bucket.offsets), strict=True):
            parameter.grad = flat[start:stop].view(parameter.shape) if summed.present[parameter] else None
