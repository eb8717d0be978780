"""What gradients are summed with and parameters are gathered with: one protocol, several implementations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from heteromesh.comm.interfaces import Work


class Collectives(Protocol):
    """Sums and copies of flat tensors over all ranks, in place; every rank makes the same calls in the same order.

    Calls return at once. Every element has one owner, the same on all ranks. A work raises GroupAborted where the
    transport behind it was aborted.
    """

    rank: int
    size: int
    sent_bytes: int
    """What this rank has sent in collectives that were waited for."""

    def bounds(self, numel: int) -> tuple[int, ...]:
        """Returns size + 1 offsets: rank i owns [bounds[i], bounds[i + 1]) of a tensor of so many elements."""

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        """Starts the sum over the ranks, with the same bits on every rank.

        key: the number of a tensor that is summed in every step, by which what compression took away from it is found
        again; None: this tensor must not be compressed.
        """

    def reduce_scatter(self, flat: torch.Tensor, key: int | None = None, *, cuts: Sequence[int] = ()) -> Work:
        """Starts the sum of which each rank gets its own range; the rest of `flat` is undefined afterwards.

        cuts: who owns what of this tensor, as `bounds` returns it; empty: what `bounds` returns.
        """

    def all_gather(
        self, flat: torch.Tensor, receivers: Collection[int] | None = None, *, cuts: Sequence[int] = ()
    ) -> Work:
        """Starts to copy every rank's own range to all, or only to these receivers: the others' `flat` is only read.

        receivers: the same on all ranks, also on those that are none. cuts: see `reduce_scatter`.
        """

    def commit(self) -> None:
        """Takes note that the sums since the last commit were applied; without it they may be repeated alike."""
        return

    def close(self) -> None:
        """Ends threads, after what they are waiting for; transports and groups stay their owners'."""


def bounds_of(fractions: Sequence[float], numel: int) -> tuple[int, ...]:
    """Returns the offsets at which fractions (positive or zero, any sum) cut a tensor of so many elements."""
    sums = list(accumulate(fractions))
    return (0, *(round(s / sums[-1] * numel) for s in sums))
