"""What a pass feeds the model: this rank's tokens, their positions and the tokens to predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from heteromesh.errors import UserError
from heteromesh.parallel.attention.layout import Layout, layout_of
from heteromesh.parallel.model.call import IGNORED
from heteromesh.planner.plan import Step


class Sequences(Protocol):
    """Random access to sequences: `data[i]` is a 1-D integer tensor or array of tokens.

    It may also be a mapping with `input_ids` and `labels` (next-token labels, already shifted, -100 to ignore).
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

    def __init__(self, data: Sequences) -> None:
        self._data = data
        self.lengths = _lengths(data)

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
        item = self._data[index]
        if isinstance(item, Mapping):
            ids, targets = _whole_numbers(item["input_ids"], index), _whole_numbers(item["labels"], index)
            if len(ids) != len(targets):
                raise UserError(
                    f"sequence {index} of the data has {len(ids)} input_ids and {len(targets)} labels: "
                    "give one label a token, -100 where there is nothing to predict"
                )
            return ids[start:end], targets[start:end]
        ids = _whole_numbers(item, index)
        return ids[start:end], _padded(ids[start + 1 : end + 1], end - start)


def _whole_numbers(values: Any, index: int) -> np.ndarray[Any, Any]:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"sequence {index} of the data is {array.dtype} of shape {array.shape}: "
            "a sequence is one row of whole numbers, the token ids"
        )
    return array.astype(np.int64)


def _padded(targets: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    return targets if len(targets) == size else np.append(targets, IGNORED)


def _lengths(data: Sequences) -> tuple[int, ...]:
    if isinstance(data, Sliceable):
        return tuple(int(n) for n in data.lengths)
    if not len(data):
        raise UserError("the data has no sequences: give at least one sequence of two tokens")
    items = (data[i] for i in range(len(data)))
    return tuple(len(item["input_ids"] if isinstance(item, Mapping) else item) for item in items)
