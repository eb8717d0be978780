"""What a pass feeds the model: this rank's tokens, their positions and the tokens to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from heteromesh.errors import UserError
from heteromesh.parallel.attention.layout import Layout, layout_of
from heteromesh.parallel.model.call import IGNORED
from heteromesh.planner.plan import Step
from heteromesh.runtime.work.items import DataFacts, Extreme, Labels, check_data, item_of, look_at


class Sequences(Protocol):
    """Random access to sequences: `data[i]` is a 1-D integer tensor or array of tokens.

    It may also be a mapping with `input_ids` and `labels` (-100: nothing to predict; `Reader` says which kind of
    labels). With an `attention_mask` too, padding at its ends is cut off.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@runtime_checkable
class Sliceable(Protocol):
    """Sequences that can be read in part, and that know their lengths (runtime.tokens.TokenStore)."""

    lengths: np.ndarray[Any, np.dtype[np.int64]]

    def slice(self, index: int, start: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens start..end (excluded) of a sequence."""


@dataclass(frozen=True, slots=True)
class PassInput:
    """The tensors of one pass on one rank, each (1, tokens of this rank)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    valid: int
    """Tokens with something to predict."""


class Reader:
    """Reads shards out of a data set."""

    def __init__(self, data: Sequences, labels: Labels = "shifted") -> None:
        """labels: shifted: `labels[i]` is what token i is to predict; unshifted: it is token i itself.

        Raises UserError for what is no data, and names the sequence that is none.
        """
        check_data(data)
        self._data, self._labels = data, labels
        self.lengths, self.facts = _look(data, labels)

    def step_inputs(self, step: Step, sequences: Sequence[int], rank: int) -> dict[int, PassInput]:
        """Returns by position in the step the input of every pass that names `rank`.

        sequences[i]: index in the data of the batch's i-th sequence.
        """
        inputs = {}
        for position, plan in step.passes_of(rank):
            layout = layout_of(plan, [step.batch[i] for i in plan.sequences])
            indices = [sequences[i] for i in plan.sequences]
            inputs[position] = self.pass_input(layout, indices, plan.ranks.index(rank))
        return inputs

    def pass_input(self, layout: Layout, indices: Sequence[int], member: int) -> PassInput:
        """Reads a pass's input; indices[j]: index in the data of the layout's j-th sequence."""
        segments = layout.segments[member]
        tokens = [np.empty(0, np.int64)]
        labels = [np.empty(0, np.int64)]
        for s in segments:
            ids, targets = self._read(indices[s.sequence], s.start, s.end, layout.lengths[s.sequence])
            tokens.append(ids)
            labels.append(targets)
        positions = [np.empty(0, np.int64)] + [np.arange(s.start, s.end) for s in segments]
        joined = [np.concatenate(parts)[None] for parts in (tokens, positions, labels)]
        # counted without torch: this runs in the plan thread, which should not start a thread pool of its own
        valid = int((joined[2] != IGNORED).sum())
        as_tensors = [torch.from_numpy(array) for array in joined]
        return PassInput(as_tensors[0], as_tensors[1], as_tensors[2], valid)

    def id_beyond(self, size: int) -> Extreme | None:
        """Returns the id of the data that is furthest outside a table of `size` rows; None where all are inside."""
        found = self.facts.ids
        if isinstance(self._data, Sliceable):
            if getattr(self._data, "vocab_size", size + 1) <= size:
                return None
            highest = (int(self._data.slice(i, 0, n).max()) for i, n in enumerate(self.lengths))
            found = [Extreme(value, index) for index, value in enumerate(highest)]
        return next((one for one in sorted(found, reverse=True) if not 0 <= one.value < size), None)

    def sample_tokens(self, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns some of the data's tokens (at most `count`, at least one)."""
        parts, have = [], 0
        for index, length in enumerate(self.lengths):
            parts.append(self._read(index, 0, length, length)[0])
            have += length
            if have >= count:
                break
        return np.concatenate(parts)[:count]

    def _read(self, index: int, start: int, end: int, length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if isinstance(self._data, Sliceable):
            ids = np.asarray(self._data.slice(index, start, min(end + 1, length)), np.int64)
            return ids[: end - start], _padded(ids[1:], end - start)
        item = item_of(self._data[index], index, self._labels)
        return item.ids[start:end], item.targets[start:end]


def _padded(targets: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    return targets if len(targets) == size else np.append(targets, IGNORED)


def _look(data: Sequences, labels: Labels) -> tuple[tuple[int, ...], DataFacts]:
    if isinstance(data, Sliceable):
        lengths = tuple(int(n) for n in data.lengths)
        return lengths, DataFacts(untrained=lengths.count(1), sequences=len(lengths), tokens=sum(lengths))
    if not len(data):
        raise UserError("the data has no sequences: give at least one sequence of two tokens")
    return look_at((data[i] for i in range(len(data))), labels)
