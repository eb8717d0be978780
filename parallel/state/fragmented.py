"""An optimizer on fragments: whichever elements of its parameters a rank holds, and their state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.elementwise import has_value_per_element, is_elementwise_state
from heteromesh.parallel.state.fragments import Fragment, KeepsPieces, Piece
from heteromesh.parallel.state.parts import Slice, StatePart, concat_state, split_state
from heteromesh.parallel.state.separable import check_separable


class FragmentedOptimizer:
    """Lets an optimizer work on fragments in place of whole parameters, from `hold` to `restore`.

    Its groups' hyperparameters, and schedules over them, work as before. State is read and written in the formats of
    the whole optimizer: its state dict, and the entries of a checkpoint by the parameters' names.

    Raises UserError for an optimizer whose parameters influence each other.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
        self.whole = check_separable(optimizer).whole
        """Parameters that it must be given as a whole."""
        self.inner, self._names = optimizer, names
        self._original = [list(group["params"]) for group in optimizer.param_groups]
        self._group = {p: i for i, group in enumerate(self._original) for p in group}
        self._fragments: list[list[Fragment]] = [[] for _ in self._original]

    @property
    def fragments(self) -> list[Fragment]:
        """Returns what is held here, in the order of the optimizer's groups."""
        return [fragment for own in self._fragments for fragment in own]

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state that are held here now."""
        values = (v for state in self.inner.state.values() for v in state.values())
        return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))

    def hold(self, fragments: Sequence[Fragment]) -> None:
        """Works on these fragments from now on, those of the optimizer's parameters; without state."""
        groups: list[list[Fragment]] = [[] for _ in self._original]
        for fragment in fragments:
            if fragment.parameter in self._group:
                groups[self._group[fragment.parameter]].append(fragment)
        self._fragments = groups
        self._use([[fragment.tensor for fragment in own] for own in groups])

    def hold_parts(self, fragments: Sequence[Fragment], parts: Sequence[StatePart]) -> None:
        """Works on these fragments from now on, with the state that the parts have of them."""
        self.hold(fragments)
        by_bucket: dict[int, list[StatePart]] = defaultdict(list)
        for part in parts:
            by_bucket[part.bucket].append(part)
        for fragment in self.fragments:
            if state := concat_state(by_bucket[fragment.bucket], fragment):
                self.inner.state[fragment.tensor] = state

    @contextmanager
    def holding(self, fragments: Sequence[Fragment], parts: Sequence[StatePart]) -> Iterator[None]:
        """Works on these fragments, with the state that the parts have of them, inside the block."""
        held, states = self._fragments, dict(self.inner.state)
        self.hold_parts(fragments, parts)
        try:
            yield
        finally:
            self.hold([fragment for own in held for fragment in own])
            self.inner.state.update(states)

    def restore(self) -> None:
        """Gives the optimizer its whole parameters back, but no state."""
        self._fragments = [[] for _ in self._original]
        self._use(self._original)

    def parts(self, slices: Sequence[Slice]) -> list[StatePart]:
        """Returns the state of those elements that are held here, without copies."""
        by_bucket: dict[int, list[Fragment]] = defaultdict(list)
        for fragment in self.fragments:
            by_bucket[fragment.bucket].append(fragment)
        found = [
            split_state(self.inner.state.get(fragment.tensor, {}), fragment, low, high)
            for bucket, low, high in slices
            for fragment in by_bucket[bucket]
        ]
        return [part for part in found if part is not None]

    def step(self) -> None:
        """Updates what is held here and drops its gradients."""
        if [len(group["params"]) for group in self.inner.param_groups] != [len(own) for own in self._fragments]:
            raise UserError(
                "parameters were added to an optimizer after it had been sharded: add them before training starts"
            )
        self.inner.step()
        self.drop()

    def drop(self) -> None:
        """Drops the gradients of what is held here."""
        for fragment in self.fragments:
            fragment.tensor.grad = None

    def state_dict(self, world: World) -> dict[str, Any]:
        """Returns the whole optimizer's, on the CPU, on every rank. Every rank must call it."""
        number = {p: i for i, p in enumerate(p for group in self._original for p in group)}
        mine = []
        for fragment in self.fragments:
            state = {
                k: (v.cpu(), is_elementwise_state(k, v, fragment.tensor.shape))
                if isinstance(v, torch.Tensor)
                else (v, False)
                for k, v in self.inner.state.get(fragment.tensor, {}).items()
            }
            mine.append((number[fragment.parameter], fragment.start, state))
        whole: dict[int, dict[str, Any]] = {}
        parameters = list(number)
        for index, start, state in (entry for entries in world.gather(mine) for entry in entries):
            for key, (value, cut) in state.items():
                place = whole.setdefault(index, {})
                if not cut:
                    place[key] = value
                    continue
                shape = parameters[index].shape
                target = place.setdefault(key, torch.empty(shape, dtype=value.dtype))
                target.view(-1)[start : start + value.numel()] = value.reshape(-1)
        return {"state": dict(sorted(whole.items())), "param_groups": self._numbered_groups()}

    def load_state_dict(self, whole: Mapping[str, Any]) -> None:
        """Takes what is held here of the whole optimizer's state. Raises ValueError for one of other groups."""
        saved = [len(group["params"]) for group in whole["param_groups"]]
        if saved != [len(group) for group in self._original]:
            raise ValueError(f"the state is of parameter groups of sizes {saved}: load it into the same groups")
        ids = [i for group in whole["param_groups"] for i in group["params"]]
        number = dict(zip((p for group in self._original for p in group), ids, strict=True))
        states = {}
        for i, fragment in enumerate(self.fragments):
            given = whole["state"].get(number[fragment.parameter])
            if given is not None:
                # copies: torch's loading may keep what it is given, and the caller's optimizer goes on with its own
                states[i] = {
                    k: fragment.slice_of(v).clone().view(fragment.tensor.shape)
                    if is_elementwise_state(k, v, fragment.shape)
                    else deepcopy(v)
                    for k, v in given.items()
                }
        self._load(states, whole["param_groups"])

    def checkpoint_entries(self, without: Collection[Fragment] = ()) -> dict[str, Any]:
        """Returns what a checkpoint has of the whole optimizer; `Piece` where there is a value for each element.

        Of each parameter at most one fragment must be held, not counting those that are left out (`without`).
        """
        found: dict[str, dict[str, Any]] = {}
        for fragment in self.fragments:
            if fragment in without:
                continue
            state, name = self.inner.state.get(fragment.tensor, {}), self._names[fragment.parameter]
            assert name not in found, f"{name} is held in several fragments"
            if state and isinstance(self.inner, KeepsPieces):
                found[name] = self.inner.checkpoint_pieces(fragment.tensor, fragment.shape, fragment.start)
                continue
            found[name] = {
                k: Piece(v.reshape(-1), fragment.shape, fragment.start)
                if is_elementwise_state(k, v, fragment.tensor.shape)
                else v
                for k, v in state.items()
            }
        return {"state": found, "param_groups": self._named_groups()}

    def checkpoint_buffers(self, stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Returns buffers for what a checkpoint has of the fragments; `Piece` where there is a value for each element.

        stored: by name and key, torch's metadata.
        """
        buffers: dict[str, dict[str, Any]] = {}
        for fragment in self.fragments:
            name, kept = self._names[fragment.parameter], {}
            if isinstance(self.inner, KeepsPieces):
                there = self.inner.checkpoint_pieces(fragment.tensor, fragment.shape, fragment.start)
                kept = {key: value for key, value in there.items() if isinstance(value, Piece)}
            for key, entry in stored.get(name, {}).items():
                buffers.setdefault(name, {})[key] = kept.get(key) or _buffer(key, entry, fragment)
        return {"state": buffers, "param_groups": self._named_groups()}

    def load_entries(self, entries: Mapping[str, Any]) -> None:
        """Takes what has been loaded into `checkpoint_buffers`."""
        states = {}
        for i, fragment in enumerate(self.fragments):
            if given := entries["state"].get(self._names[fragment.parameter]):
                loaded = {k: v.loaded() if isinstance(v, Piece) else v for k, v in given.items()}
                flat = {k for k, v in given.items() if isinstance(v, Piece) and isinstance(loaded[k], torch.Tensor)}
                shape = fragment.tensor.shape
                states[i] = {k: v.view(shape) if k in flat else v for k, v in loaded.items()}
        self._load(states, entries["param_groups"])

    def _use(self, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        self.inner.state.clear()
        # not strict: somebody may have added a group since
        for group, own in zip(self.inner.param_groups, parameters, strict=False):
            group["params"] = list(own)

    def _load(self, states: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Loads states, by position among the fragments. Torch's own loading does the rest."""
        numbered: list[dict[str, Any]] = []
        for group, own in zip(groups, self._fragments, strict=True):
            start = sum(len(g["params"]) for g in numbered)
            numbered.append(dict(group) | {"params": list(range(start, start + len(own)))})
        self.inner.load_state_dict({"state": dict(states), "param_groups": numbered})

    def _numbered_groups(self) -> list[dict[str, Any]]:
        first = accumulate((len(group) for group in self._original), initial=0)
        return [
            group | {"params": list(range(start, start + len(original)))}
            for group, original, start in zip(self.options, self._original, first, strict=False)
        ]

    def _named_groups(self) -> list[dict[str, Any]]:
        return [
            group | {"params": [self._names[p] for p in original]}
            for group, original in zip(self.options, self._original, strict=True)
        ]

    def set_options(self, options: Sequence[Mapping[str, Any]]) -> None:
        """Takes the groups' hyperparameters over."""
        for group, values in zip(self.inner.param_groups, options, strict=True):
            group.update(values)

    @property
    def options(self) -> list[dict[str, Any]]:
        """Returns the groups' hyperparameters."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self.inner.param_groups]


def _buffer(key: str, entry: Any, fragment: Fragment) -> Any:
    """Returns where a stored value of a fragment is loaded to; None for what is no tensor. entry: torch's metadata."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if not has_value_per_element(key, entry.size, fragment.shape):
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    empty = torch.empty(fragment.tensor.numel(), dtype=entry.properties.dtype)
    return Piece(empty, entry.size, fragment.start)
