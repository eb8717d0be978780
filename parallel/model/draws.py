"""The draws of one pass: which random numbers its tokens get, by where they are in the batch and in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from heteromesh.errors import UserError
from heteromesh.parallel.attention.scope import Scope, backward_number
from heteromesh.parallel.model.counter import drawn_below, key_of, token_keys
from heteromesh.planner.splitting.layout import Segment


class TokenPlaces(NamedTuple):
    """Where the tokens of a pass on this rank are in the step's batch; (n,) both."""

    sequences: torch.Tensor
    """Place of the token's sequence in the batch."""
    positions: torch.Tensor
    """The token's place in its sequence."""


def token_places(
    segments: Sequence[Segment], places: Sequence[int], device: torch.device, starts: Sequence[int] = ()
) -> TokenPlaces:
    """Returns the places of a rank's tokens, given its segments and places[j] in the batch of the j-th sequence.

    starts[j]: where that begins in what the batch has in its place, if not at 0.
    """
    sizes = [len(s) for s in segments]
    sequences = np.repeat(np.array([places[s.sequence] for s in segments], np.int64), sizes)
    positions = np.concatenate(
        [np.empty(0, np.int64)] + [np.arange(s.start, s.end) + (starts[s.sequence] if starts else 0) for s in segments]
    )
    return TokenPlaces(torch.from_numpy(sequences).to(device), torch.from_numpy(positions).to(device))


class Draws:
    """The draws of one pass, and where in the model it is."""

    def __init__(self, key: int, places: TokenPlaces, foreign: Sequence[str] = (), source: object = None) -> None:
        """foreign: sections whose dropouts are another stage's. source: who may say which section comes next."""
        self.key, self.places, self.source, self._foreign = key, places, source, foreign
        self._section = ""
        self._entered: Counter[str] = Counter()
        self._again: Counter[str] = Counter()

    def enter(self, section: str) -> None:
        """Begins a section of the model: a layer, or what follows it.

        In a backward it is entered to be computed again, the last time first: what was drawn then is drawn again.
        """
        self._section = section
        if backward_number() == -1:
            self._entered[section] += 1
            number = self._entered[section]
        else:
            number = max(1, self._entered[section] - self._again[section])
            self._again[section] += 1
        seed = key_of(self.key, section, number)
        torch.default_generator.manual_seed(seed)
        if (device := self.places.sequences.device).type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)

    def again(self) -> Draws:
        """Returns draws that repeat what these will draw from here on."""
        repeated = copy(self)
        repeated._entered, repeated._again = self._entered.copy(), Counter()
        return repeated

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes dropouts of this thread draw from here within the block."""
        with ACTIVE_DRAWS.holding(self):
            yield

    @property
    def is_foreign(self) -> bool:
        """Whether what is drawn now is drawn by another stage; what is computed again never is."""
        return self._section in self._foreign and backward_number() == -1

    def number(self) -> int:
        """Draws a number for a call of a dropout.

        It is of torch's generator, which the section has seeded: whoever computes something again (`checkpoint`) puts
        that generator back to where it was, and so draws the same.
        """
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_())

    def dropped(self, level: int, shape: Sequence[int], name: str) -> torch.Tensor:
        """Draws what is dropped of a tensor of this shape, each element with probability level / LEVELS."""
        axis = self._token_axis(shape, name)
        others = [*shape[:axis], *shape[axis + 1 :]]
        call = self.number()
        mask = drawn_below(level, self._keys, call, prod(others))
        return mask.view(-1, *others).movedim(0, axis) if axis else mask.reshape(*shape)

    @cached_property
    def _keys(self) -> torch.Tensor:
        return token_keys(self.key, *self.places)

    def _token_axis(self, shape: Sequence[int], name: str) -> int:
        count, last = len(self.places.sequences), len(shape) - 1
        if count == 1 or not shape or shape[0] != 1:
            found = [axis for axis in range(len(shape) if count == 1 else 1) if shape and shape[axis] == count][:1]
        else:
            # (1, n, ...) or (1, heads, n, dim), but not attention's (1, heads, n, n)
            found = [axis for axis in (1, 2) if axis <= max(1, last - 1) and axis <= last and shape[axis] == count]
            found = [] if last > 2 and shape[-2] == shape[-1] == count else found
        if len(found) == 1:
            return found[0]
        raise UserError(
            f"{name} of a tensor {tuple(shape)} in a pass of {count} tokens on this rank can't be drawn by token: the "
            "tokens must be the first dimension, the second of (1, n, ...) or the third of (1, heads, n, dim), and no "
            "other; set its probability to 0 (attention dropout: attention_dropout=0), or move it to hidden states"
        )


ACTIVE_DRAWS: Scope[Draws] = Scope("heteromesh_draws")


def active_draws() -> Draws | None:
    """Returns the draws of the pass that this thread is in, if any, also in a backward of it."""
    return ACTIVE_DRAWS.get()
