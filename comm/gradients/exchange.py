"""What a training loop and its engines ask of the exchange of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.world import World

Members = tuple[int, ...]
"""Ids in the order of a pass's ranks."""
Held = Mapping[Members, Sequence[Sequence[int]]]
"""By set of members, for each of its passes the sequences (their places in the batch)."""


@dataclass(slots=True, eq=False)
class Share:
    """What a set of members has worked through together, as one of them has it. Engines add to both numbers."""

    loss: float | torch.Tensor = 0.0
    """Sum over this member's tokens."""
    valid: float | torch.Tensor = 0.0
    """What the loss is to be divided by in the end: tokens with something to predict, or weights."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Summed:
    """A step's gradients, summed over all ranks."""

    loss: float
    """Sum over the tokens of all ranks."""
    valid: float
    """What it is divided by: the tokens with something to predict, or the weights of a loss of the user's own."""
    present: Mapping[nn.Parameter, bool]
    """Whether any rank has a gradient for the parameter."""
    tensors: tuple[torch.Tensor, ...]
    """By bucket, the whole sum, or this rank's range of it where sums are scattered. Empty in a world of one rank that
    keeps and scatters nothing: the sums are the parameters' gradients there."""
    digest: str
    """Where gradients are kept: equal on all members exactly where the results are (scattered ranges are left out)."""
    exposed_seconds: float
    """Waited in `finish`."""
    scale: float = 1.0
    """Still to be multiplied in."""


class GradientExchange(Protocol):
    """Collects gradients share by share and sums them over the ranks once a step."""

    buckets: list[Bucket]
    """Fixed for the job, and the same on all ranks."""

    def begin(self, step: int, world: World) -> None:
        """Begins an attempt at a step. What an earlier attempt at the same step holds stays where gradients are kept
        apart; another step drops it."""

    def held(self) -> Held:
        """Returns what there is here, for the other members."""

    def settle(self, held: Mapping[int, Held]) -> None:
        """Keeps what all members that worked on it are still here with.

        held: what each member of the epoch holds, by id; the same on all members.
        """

    @property
    def done(self) -> frozenset[int]:
        """Sequences (places in the batch) that are held: as settled, or by this rank where nothing is kept apart."""

    def share(self, members: Members, sequences: Sequence[int]) -> AbstractContextManager[Share]:
        """Returns a context whose backward passes add to the gradients of these members; its end counts the pass.

        When it raises where gradients are kept, all that this member has of that set is dropped.
        """

    def last_backward(self) -> None:
        """Says that the next backward is this rank's last in this attempt: buckets leave as they fill."""

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """Says that this attempt adds no more to the gradients of these parameters, with passes or without.

        Every rank says so of the same parameters in the same order; buckets whose parameters are all complete leave.
        """
        del parameters

    def flush(self) -> None:
        """Starts all sums that have not been started; also on ranks without passes."""

    def finish(self) -> Summed:
        """Flushes, waits for all sums and takes the gradients off the parameters. Raises GroupAborted."""

    def committed(self) -> None:
        """Takes note that the step's sums were applied: nothing of them is needed again."""

    def close(self) -> None:
        """Takes its hooks off the parameters."""
