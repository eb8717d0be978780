"""What a pass feeds the model: this rank's tokens, their positions and the tokens to predict."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from heteromesh.errors import UserError
from heteromesh.parallel.attention.layout import Layout, layout_of
from heteromesh.parallel.model.call import IGNORED
from heteromesh.parallel.model.loss import owned_items
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.splitting.parts import divide
from heteromesh.runtime.work.examples import Example, ExampleForm, example_of, look_at_examples, stretched
from heteromesh.runtime.work.items import DataFacts, Extreme, Labels, check_data, item_of, look_at

_SAMPLED = 64
"""Items of which the sample's are taken."""


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
    """Tokens with something to predict; with a loss of the user's own, all."""
    fields: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the data has for a loss of the user's own: rows by token, or by item that ends here."""
    parts: tuple[tuple[int, ...], ...] = ()
    """Lengths of the sequences that each of the plan's consists of, where that may be several."""

    @property
    def parts_per_item(self) -> int:
        """Returns how many sequences an item of the data has."""
        return len(self.parts[0]) if self.parts else 1

    @property
    def starts(self) -> tuple[int, ...]:
        """Returns for each sequence of the pass where it begins in its item; () where all begin at 0."""
        return tuple(start for lengths in self.parts for start in (0, *itertools.accumulate(lengths[:-1])))

    def divided(self, plan: Pass, lengths: Sequence[int]) -> tuple[Pass, Sequence[int]]:
        """Returns the pass that is run, and its sequences' lengths; lengths: of the plan's own."""
        return divide(plan, self.parts) if self.parts else (plan, lengths)

    def by_sequence(self, places: Sequence[int]) -> Sequence[int]:
        """Returns what the plan's sequences have for each of the pass's."""
        return [place for place in places for _ in range(self.parts_per_item)]


class Reader:
    """Reads shards out of a data set."""

    def __init__(self, data: Sequences, labels: Labels = "shifted", *, examples: bool = False) -> None:
        """labels: shifted: `labels[i]` is what token i is to predict; unshifted: it is token i itself. examples: read
        items for a loss of the user's own (docs/losses.md).

        Raises UserError for what is no data, and names the sequence that is none.
        """
        check_data(data)
        self._data, self._labels = data, labels
        self._form: ExampleForm | None = None
        if examples and not isinstance(data, Sliceable):
            self.lengths, self.facts, self._form = look_at_examples((data[i] for i in range(len(data))), labels)
        else:
            self.lengths, self.facts = _look(data, labels)
            self._form = ExampleForm() if examples else None

    def step_inputs(self, step: Step, sequences: Sequence[int], rank: int) -> dict[int, PassInput]:
        """Returns by position in the step the input of every pass that names `rank`.

        sequences[i]: index in the data of the batch's i-th sequence.
        """
        inputs = {}
        for position, plan in step.passes_of(rank):
            indices = [sequences[i] for i in plan.sequences]
            if self._form is None:
                layout = layout_of(plan, [step.batch[i] for i in plan.sequences])
                inputs[position] = self.pass_input(layout, indices, plan.ranks.index(rank))
            else:
                inputs[position] = self.example_input(plan, [self._example(i) for i in indices], rank)
        return inputs

    def example_input(self, plan: Pass, examples: Sequence[Example], rank: int) -> PassInput:
        """Returns a pass's input for a loss of the user's own; examples[j]: the plan's j-th."""
        assert self._form is not None
        parts = tuple(tuple(map(len, example.ids)) for example in examples)
        layout, member = layout_of(*divide(plan, parts)), plan.ranks.index(rank)
        count = self._form.parts
        segments = [(s, examples[s.sequence // count], s.sequence % count) for s in layout.segments[member]]

        def joined(rows: list[np.ndarray[Any, Any]], like: np.ndarray[Any, Any]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([like[:0], *rows]))

        tokens = joined([e.ids[k][s.start : s.end] for s, e, k in segments], examples[0].ids[0])[None]
        positions = joined([np.arange(s.start, s.end) for s, _, _ in segments], np.empty(0, np.int64))[None]
        fields = {
            name: joined([e.by_token[name][k][s.start : s.end] for s, e, k in segments], rows[0])
            for name, rows in examples[0].by_token.items()
        }
        here = owned_items(layout, count)[member]
        for name, value in examples[0].by_item.items():
            fields[name] = joined([examples[i].by_item[name][None] for i in here], value[None])
        nothing = torch.full_like(tokens, IGNORED)
        return PassInput(tokens, positions, nothing, tokens.numel(), fields, parts)

    def sample_input(self, plan: Pass, lengths: Sequence[int], rank: int) -> PassInput:
        """Returns an input of any lengths, for passes that are measured or tried: of the data's own items, repeated.

        lengths[j]: of the plan's j-th sequence. Without a loss of the user's own, labels are ids of the data.
        """
        if self._form is not None:
            found = [self._example(j % min(_SAMPLED, len(self.lengths))) for j in range(len(lengths))]
            return self.example_input(plan, [stretched(e, n) for e, n in zip(found, lengths, strict=True)], rank)
        segments = layout_of(plan, lengths).segments[plan.ranks.index(rank)]
        positions = torch.from_numpy(np.concatenate([[], *(np.arange(s.start, s.end) for s in segments)])).long()[None]
        tokens = torch.from_numpy(self._sample)[torch.arange(positions.numel()) % len(self._sample)][None]
        return PassInput(tokens, positions, tokens, tokens.numel())

    @cached_property
    def _sample(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.sample_tokens(4096)

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
            parts.append(
                np.concatenate(self._example(index).ids) if self._form else self._read(index, 0, length, length)[0]
            )
            have += length
            if have >= count:
                break
        return np.concatenate(parts)[:count]

    def shortest_examples(self) -> list[Example]:
        """Returns the two shortest of the sample's items; the same twice where there is one."""
        indices = sorted(range(min(_SAMPLED, len(self.lengths))), key=lambda i: self.lengths[i])
        return [self._example(i) for i in (indices * 2)[:2]]

    def _example(self, index: int) -> Example:
        assert self._form is not None
        if isinstance(self._data, Sliceable):
            length = int(self.lengths[index])
            ids, targets = self._read(index, 0, length, length)
            return Example((ids,), {"labels": (targets,)}, {})
        return example_of(self._data[index], index, self._labels, self._form)

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
