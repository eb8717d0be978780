"""Which sequences make up which batch: one endless order, a function of the lengths, the seed and batch_tokens.

Neither the world size nor the plan has a say, so the same seed gives the same batches on any cluster, and a run
that stops and resumes elsewhere goes on with the batch it would have seen.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heteromesh.errors import UserError

_IDENTITY = {
    "dataset": "data set (sequence lengths)",
    "count": "number of sequences",
    "seed": "seed",
    "batch_tokens": "batch size in tokens",
}
_PLACE = ("index", "epoch", "position")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The sequences of one step."""

    index: int
    """Batches before this one since the start of training."""
    epoch: int
    sequences: tuple[int, ...]
    """Indices into the token store, each once."""
    lengths: tuple[int, ...]
    """Tokens of each."""
    position: int
    """Sequences of the epoch used up with this batch."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Sampler:
    """Endless batches over `lengths` (tokens per sequence), each sequence exactly once an epoch.

    A batch takes whole sequences in the epoch's order while they fit `batch_tokens`; a longer sequence is a batch of
    its own, and an epoch's last batch may be smaller. O(sequences) once an epoch, O(log sequences) a batch beyond
    the batch itself. Raises UserError for lengths or settings that are not positive whole numbers.
    """

    def __init__(self, lengths: npt.ArrayLike, *, batch_tokens: int, seed: int) -> None:
        self._lengths = _checked_lengths(lengths)
        self._batch_tokens = _whole("batch_tokens", batch_tokens, minimum=1)
        self._seed = _whole("seed", seed, minimum=0)
        self._dataset = hashlib.blake2b(self._lengths.astype("<i8").tobytes(), digest_size=16).hexdigest()
        self._index = self._position = 0
        self._start_epoch(0)

    def next_batch(self) -> Batch:
        """Returns the next batch; never ends."""
        if self._position == self._order.size:
            self._start_epoch(self._epoch + 1)
            self._position = 0
        room = self._ends[self._position] + self._batch_tokens
        start, stop = self._position, int(np.searchsorted(self._ends, room, side="right")) - 1
        stop = max(stop, start + 1)
        chosen = self._order[start:stop]
        batch = Batch(
            index=self._index,
            epoch=self._epoch,
            sequences=tuple(chosen.tolist()),
            lengths=tuple(self._lengths[chosen].tolist()),
            position=stop,
        )
        self._index, self._position = self._index + 1, stop
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """Returns the state after the last batch handed out; JSON-able. With batches prefetched, use `state_after`."""
        return self._state(self._index, self._epoch, self._position)

    def state_after(self, batch: Batch) -> dict[str, int | str]:
        """Returns the state to continue behind `batch`, however many later ones were already handed out."""
        return self._state(batch.index + 1, batch.epoch, batch.position)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continues where `state` was taken.

        Raises UserError, and changes nothing, for a state of another data set, seed or batch size, or no state at all.
        """
        for key in (*_IDENTITY, *_PLACE):
            if key not in state:
                raise UserError(f"sampler state lacks {key!r}: resume from a complete checkpoint")
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise UserError(
                    f"checkpoint has {_IDENTITY[key]} {state[key]}, this run has {mine}: "
                    f"resume with the same data and settings, or start a new run"
                )
        index, epoch, position = (_whole(f"sampler state {key}", state[key], minimum=0) for key in _PLACE)
        if position > self._lengths.size:
            raise UserError(
                f"sampler state position {position} is beyond the {self._lengths.size} sequences of an epoch: "
                f"resume from another checkpoint"
            )
        if epoch != self._epoch:
            self._start_epoch(epoch)
        self._index, self._position = index, position

    def _identity(self) -> dict[str, int | str]:
        return {
            "count": int(self._lengths.size),
            "dataset": self._dataset,
            "seed": self._seed,
            "batch_tokens": self._batch_tokens,
        }

    def _state(self, index: int, epoch: int, position: int) -> dict[str, int | str]:
        return {**self._identity(), "index": index, "epoch": epoch, "position": position}

    def _start_epoch(self, epoch: int) -> None:
        # RandomState: of numpy's shuffles the only one whose stream is promised never to change (NEP 19), and
        # hosts with different numpy versions must agree
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        self._order = np.random.RandomState(bits).permutation(self._lengths.size)
        self._ends = np.concatenate(([0], np.cumsum(self._lengths[self._order])))
        self._epoch = epoch


def _checked_lengths(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    values = np.asarray(lengths)
    if values.ndim != 1 or not values.size:
        raise UserError(f"sequence lengths have shape {values.shape}: give one length per sequence, at least one")
    if values.dtype.kind not in "iu":
        raise UserError(f"sequence lengths are {values.dtype}, not whole numbers: give tokens per sequence")
    wrong = np.flatnonzero(values < 1)
    if wrong.size:
        at = int(wrong[0])
        raise UserError(f"sequence {at} has length {values[at]}, lengths must be at least 1: leave empty sequences out")
    return values.astype(np.int64)


def _whole(name: str, value: object, *, minimum: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise UserError(f"{name} is {value!r}: give a whole number of at least {minimum}")
    return number
