"""The sharded optimizer (ZeRO-1 and 2, arXiv 1910.02054) with uneven shards: each rank updates what it owns.

Gradients of a bucket are summed by their owners alone (reduce-scatter, during the last backward), each owner updates
its range of the bucket's parameters and keeps their optimizer state, and the updated parameters are gathered from
their owners while the next forward already runs. Who owns how much is the collectives' affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from heteromesh.comm.gradients.sum import GradientSum
from heteromesh.errors import UserError
from heteromesh.parallel.state.elementwise import check_elementwise, is_elementwise_state
from heteromesh.parallel.state.fragments import Fragment, Piece
from heteromesh.parallel.state.gather import ParameterGather


class ShardedOptimizer:
    """Runs `optimizer` over the fragments of parameters that this rank owns.

        executor = StepExecutor(model, world, collectives=collectives)
        optimizer = ShardedOptimizer(torch.optim.AdamW(model.parameters()), model, executor.gradients)
        executor.run(...); optimizer.clip_gradients(1.0); optimizer.step()

    Any element-wise optimizer will do; it is tried out here. From here to `close` the optimizer's groups hold this
    rank's fragments (their hyperparameters, and schedules over them, work as before) and the parameters of a bucket
    lie one after the other in memory. State that the optimizer has already is kept. Parameters are up to date when
    the model's forward uses them; before they are used otherwise, call `wait`. Every rank makes the same calls.

    Raises UserError for optimizers that are not element-wise, for parameters that are not the model's, and for
    embeddings with sparse gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, gradients: GradientSum) -> None:
        self.inner, self._gradients, self._world = optimizer, gradients, gradients.world
        if self._world.size == 1:
            raise UserError("one rank has nothing to shard: use the optimizer as it is, or start more ranks")
        _check_model(optimizer, model, gradients)
        check_elementwise(optimizer)
        # torch.compile's wrapper is no part of a name, as in torch's own checkpoints
        self.names = {p: name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
        self._original = [list(group["params"]) for group in optimizer.param_groups]
        before = optimizer.state_dict()
        flats = [_flatten(bucket.parameters) for bucket in gradients.buckets]
        self._fragments = self._cut(flats)
        for group, own in zip(optimizer.param_groups, self._fragments, strict=True):
            group["params"] = [fragment.tensor for fragment in own]
        optimizer.state.clear()
        self._load(before)
        self._gather = ParameterGather(model, gradients, flats)
        gradients.scatter = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self.inner.param_groups

    @property
    def fragments(self) -> list[Fragment]:
        """What this rank owns, in the order of the optimizer's groups."""
        return [fragment for own in self._fragments for fragment in own]

    @property
    def state_bytes(self) -> int:
        """Optimizer state that this rank holds now."""
        values = (v for state in self.inner.state.values() for v in state.values())
        return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))

    def clip_gradients(self, limit: float = math.inf) -> float:
        """Scales the step's gradients so that their norm over all ranks is at most `limit`; the norm before, equal on
        every rank."""
        self._hand_gradients()
        mine = [f.tensor.grad for f in self.fragments if f.tensor.grad is not None]
        squares = torch.zeros(self._world.size, dtype=torch.float64)
        squares[self._world.rank] = _squared_norm(mine)
        # one number a rank, added in rank order: the same bits everywhere
        norm = math.sqrt(sum(self._world.sum(squares).tolist()))
        if math.isfinite(norm):
            total = torch.tensor(norm, device=self._world.device)
            torch.nn.utils.clip_grads_with_norm_([f.tensor for f in self.fragments], limit, total)
        return norm

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates what this rank owns and starts to gather the parameters."""
        if closure is not None:
            raise UserError("step was given a closure, which a sharded optimizer can't call again: call step() alone")
        owned = [len(own) for own in self._fragments]
        if [len(group["params"]) for group in self.inner.param_groups] != owned:
            raise UserError(
                "parameters were added to an optimizer after it had been sharded: add them before training starts"
            )
        self.wait()
        self._hand_gradients()
        self.inner.step()
        self.zero_grad()
        for bucket in self._gradients.buckets:
            bucket.shard = None
        self._gather.start()

    def zero_grad(self) -> None:
        """Drops the gradients of the fragments."""
        for fragment in self.fragments:
            fragment.tensor.grad = None

    def wait(self) -> None:
        """Returns when all parameters are up to date on this rank: before they are saved or used outside a forward."""
        self._gather.wait_all()

    def state_dict(self) -> dict[str, Any]:
        """As the unsharded optimizer's, whole, on the CPU, on every rank: it loads there and the other way round.

        Every rank must call it. Takes the memory that sharding saves; checkpoints do without.
        """
        number = {p: i for i, p in enumerate(p for group in self._original for p in group)}
        mine = []
        for fragment in self.fragments:
            state = {
                k: (v.cpu(), is_elementwise_state(k, v, fragment.tensor)) if isinstance(v, torch.Tensor) else (v, False)
                for k, v in self.inner.state.get(fragment.tensor, {}).items()
            }
            mine.append((number[fragment.parameter], fragment.start, state))
        whole: dict[int, dict[str, Any]] = {}
        parameters = list(number)
        for index, start, state in (entry for entries in self._world.gather(mine) for entry in entries):
            for key, (value, cut) in state.items():
                place = whole.setdefault(index, {})
                if not cut:
                    place[key] = value
                    continue
                shape = parameters[index].shape
                target = place.setdefault(key, torch.empty(shape, dtype=value.dtype))
                target.view(-1)[start : start + value.numel()] = value
        return {"state": dict(sorted(whole.items())), "param_groups": self._described_groups()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this rank's part of the unsharded optimizer's state. Raises ValueError for one of other groups."""
        saved = [len(group["params"]) for group in state["param_groups"]]
        if saved != [len(group) for group in self._original]:
            raise ValueError(f"the state is of parameter groups of sizes {saved}: load it into the same groups")
        self._load(state)

    def pieces(self) -> dict[str, dict[str, Any]]:
        """By parameter name, this rank's part of the state: `Piece` where there is a value for each element."""
        found = {}
        for fragment in self.fragments:
            state = self.inner.state.get(fragment.tensor, {})
            shape, start = fragment.parameter.shape, fragment.start
            found[self.names[fragment.parameter]] = {
                k: Piece(v, shape, start) if is_elementwise_state(k, v, fragment.tensor) else v
                for k, v in state.items()
            }
        return found

    def load_pieces(self, pieces: Mapping[str, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes what `pieces` and `named_groups` gave, cut for this rank."""
        states = {}
        for i, fragment in enumerate(self.fragments):
            given = pieces.get(self.names[fragment.parameter], {})
            if given:
                states[i] = {k: v.tensor if isinstance(v, Piece) else v for k, v in given.items()}
        self._load_fragments(states, groups)

    def named_groups(self) -> list[dict[str, Any]]:
        """The parameter groups with the names of whole parameters in place of this rank's fragments."""
        return [
            {k: v for k, v in group.items() if k != "params"} | {"params": [self.names[p] for p in original]}
            for group, original in zip(self.inner.param_groups, self._original, strict=True)
        ]

    def close(self) -> None:
        """Gives the optimizer the model's parameters back, but no state: that of all ranks is in `state_dict` and in
        checkpoints."""
        try:
            self.wait()
        finally:
            self._restore()

    def _restore(self) -> None:
        self._gather.close()
        self._gradients.scatter = False
        self.inner.state.clear()
        for group, original in zip(self.inner.param_groups, self._original, strict=False):
            group["params"] = original

    def _cut(self, flats: list[torch.Tensor]) -> list[list[Fragment]]:
        """This rank's fragments, by parameter group."""
        owned: dict[torch.Tensor, Fragment] = {}
        for bucket, flat in zip(self._gradients.buckets, flats, strict=True):
            low, high = self._range(bucket.numel)
            for parameter, start, stop in zip(bucket.parameters, bucket.offsets, bucket.offsets[1:], strict=False):
                first, last = max(low, start), min(high, stop)
                if first < last:
                    owned[parameter] = Fragment(parameter, first - start, nn.Parameter(flat[first:last]))
        return [[owned[p] for p in group if p in owned] for group in self._original]

    def _range(self, numel: int) -> tuple[int, int]:
        low, high = self._gradients.collectives.bounds(numel)[self._world.rank :][:2]
        return low, high

    def _hand_gradients(self) -> None:
        """The step's gradients to the fragments, once."""
        owned = {fragment.parameter: fragment for fragment in self.fragments}
        for bucket in self._gradients.buckets:
            if bucket.shard is None:
                continue
            low, _ = self._range(bucket.numel)
            for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=False):
                fragment = owned.get(parameter)
                if fragment is not None and self._gradients.present[parameter]:
                    first = offset + fragment.start - low
                    fragment.tensor.grad = bucket.shard[first : first + fragment.tensor.numel()]

    def _load(self, whole: Mapping[str, Any]) -> None:
        """From the unsharded optimizer's format; torch's own loading does the rest."""
        ids = [i for group in whole["param_groups"] for i in group["params"]]
        number = dict(zip((p for group in self._original for p in group), ids, strict=True))
        state = {}
        for i, fragment in enumerate(self.fragments):
            given = whole["state"].get(number[fragment.parameter])
            if given is not None:
                # copies: torch's loading may keep what it is given, and the caller's optimizer goes on with its own
                state[i] = {
                    k: fragment.slice_of(v).clone() if is_elementwise_state(k, v, fragment.parameter) else deepcopy(v)
                    for k, v in given.items()
                }
        self._load_fragments(state, whole["param_groups"])

    def _load_fragments(self, states: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """states: by position among the fragments."""
        numbered: list[dict[str, Any]] = []
        for group, own in zip(groups, self._fragments, strict=True):
            start = sum(len(g["params"]) for g in numbered)
            numbered.append(dict(group) | {"params": list(range(start, start + len(own)))})
        self.inner.load_state_dict({"state": dict(states), "param_groups": numbered})

    def _described_groups(self) -> list[dict[str, Any]]:
        first = accumulate((len(group) for group in self._original), initial=0)
        return [
            {k: v for k, v in group.items() if k != "params"} | {"params": list(range(start, start + len(original)))}
            for group, original, start in zip(self.inner.param_groups, self._original, first, strict=False)
        ]


def _squared_norm(tensors: Sequence[torch.Tensor]) -> float:
    """Of all together; norms of low-precision tensors in float32."""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    norms = [torch.linalg.vector_norm(t, dtype=dtype).double() for t, dtype in zip(tensors, wide, strict=True)]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def _flatten(parameters: tuple[nn.Parameter, ...]) -> torch.Tensor:
    """Moves parameters into one flat tensor, of which they are views from now on."""
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return flat


def _check_model(optimizer: torch.optim.Optimizer, model: nn.Module, gradients: GradientSum) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    bucketed = {p for bucket in gradients.buckets for p in bucket.parameters}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in names:
            raise UserError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's: "
                "give it the model's parameters only, or turn shard_optimizer off"
            )
        if parameter.requires_grad and parameter not in bucketed:
            raise UserError(
                f"parameter {names[parameter]} was made trainable after the executor had been made: "
                "set requires_grad before training starts"
            )
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and any(p in bucketed for p in module.parameters(recurse=False)):
            raise UserError(
                f"{name or type(module).__name__} has sparse gradients, which can't be sharded: "
                "build it with sparse=False or turn shard_optimizer off"
            )
