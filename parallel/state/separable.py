"""How an optimizer's work can be dealt out: by elements, by whole parameters, or not at all; found out by trying it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.elementwise import check_elementwise_group, first_line, is_elementwise_state, over
from heteromesh.planner.ownership.whole import deal_whole

_SIDES = (6, 7, 5, 3, 2, 4, 8)
"""Of a tensor that is tried: all different, so that the sides of its state tell whose they are."""
_SCALES = (1e-4, 1.0, 1e3)
"""Of parameters' gradients: what one does to the other shows."""
_WEIGHTS = 0.01
"""Of parameters: small, so that 16 bits show what an update does."""
_STEPS = 3
_FINE = 1 << 30
"""Elements by which fractions are told."""


@dataclass(frozen=True, slots=True)
class Separation:
    """What an optimizer needs together, and what it keeps."""

    whole: frozenset[nn.Parameter]
    """Parameters whose update needs all of their gradient."""
    state_bytes: Mapping[nn.Parameter, float]
    """Of optimizer state, by trained parameter."""


def check_separable(optimizer: torch.optim.Optimizer) -> Separation:
    """Steps copies of the optimizer over small tensors: whole and in two parts, together and each alone.

    Raises UserError where parameters influence each other, when it can't step without more than gradients, and where
    its step communicates.
    """
    whole: set[nn.Parameter] = set()
    state: dict[nn.Parameter, float] = {}
    reason: UserError | None = None
    with _NoCommunication():  # type: ignore[no-untyped-call]  # torch's
        for group in optimizer.param_groups:
            trained = [p for p in group["params"] if p.requires_grad]
            if not trained:
                continue
            try:
                each = check_elementwise_group(optimizer, group, trained[0])
            except UserError as error:
                whole.update(trained)
                reason = reason or error
            else:
                state |= {p: each * p.numel() for p in trained}
        samples = _samples(optimizer)
        kept = _check_apart(optimizer, samples, reason)
    for sample, entries in zip(samples, kept, strict=True):
        state |= {p: _scaled(entries, sample, p.shape) for p in sample.like if p in whole}
    return Separation(frozenset(whole), state)


def check_cut_anywhere(optimizer: torch.optim.Optimizer, setting: str) -> None:
    """Raises UserError for an optimizer that needs whole parameters, where the setting's ranges are cut anywhere."""
    if check_separable(optimizer).whole:
        raise UserError(
            f"{type(optimizer).__name__} is not element-wise, and where members come and go parameters are cut "
            f"anywhere: use an optimizer such as AdamW, or turn {setting} or fault_tolerance off"
        )


def deal_buckets(buckets: Sequence[Bucket], whole: Iterable[nn.Parameter], world: World) -> None:
    """Gives the parameters of the buckets with any of `whole` to one rank each, near to the fractions of the world's
    collectives. All ranks must call it, before anything lies in flat tensors.
    """
    assert world.collectives is not None
    needed, bounds = set(whole), world.collectives.bounds(_FINE)
    # kernels of unlike devices may differ in what they take apart
    told = world.gather([any(p in needed for p in bucket.parameters) for bucket in buckets])
    chosen = [bucket for bucket, *wanted in zip(buckets, *told, strict=True) if any(wanted)]
    sizes = [[shape.numel() * bucket.dtype.itemsize for shape in bucket.shapes] for bucket in chosen]
    fractions = [high - low for low, high in pairwise(bounds)]
    for bucket, owners in zip(chosen, deal_whole(sizes, fractions), strict=True):
        bucket.deal(owners, world.size)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A small tensor in place of parameters of a group."""

    group: int
    like: tuple[nn.Parameter, ...]
    """Those of its group with as many dimensions and the same dtype."""
    values: tuple[torch.Tensor, ...]
    """At first, and the gradients of each step."""


class _NoCommunication(TorchDispatchMode):
    """Refuses collectives: other ranks may not be in a trial, and whoever owns a whole parameter is alone with it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            raise UserError("its step communicates with other ranks, who may own nothing: use the one for one device")
        return func(*args, **(kwargs or {}))


def _samples(optimizer: torch.optim.Optimizer) -> list[_Sample]:
    """Returns tensors, with small and large gradients, for each kind of parameter of each group."""
    noise, found = torch.Generator().manual_seed(0), []
    for number, group in enumerate(optimizer.param_groups):
        kinds: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                kinds.setdefault((parameter.ndim, parameter.dtype), []).append(parameter)
        for (ndim, dtype), like in kinds.items():
            device = "cpu" if like[0].is_meta else like[0].device
            for scale in _SCALES:
                values = [torch.randn(_SIDES[:ndim], generator=noise) for _ in range(_STEPS + 1)]
                scaled = [values[0] * _WEIGHTS, *(value * scale for value in values[1:])]
                found.append(_Sample(number, tuple(like), tuple(v.to(device, dtype) for v in scaled)))
    return found


def _check_apart(
    optimizer: torch.optim.Optimizer, samples: Sequence[_Sample], reason: UserError | None
) -> list[Mapping[str, Any]]:
    """Compares each sample's update among the others with that of it alone; returns the state of each.

    reason: why the optimizer is not element-wise, if it isn't.
    """
    name = type(optimizer).__name__
    try:
        together, states = _stepped(optimizer, samples)
    except Exception as error:
        raise reason or _failed(name, error) from error
    idle = {sample.group for sample in samples}
    for sample, among in zip(samples, together, strict=True):
        try:
            (alone,), _ = _stepped(optimizer, [sample])
        except Exception as error:
            raise reason or _failed(name, error) from error
        update = float((alone.double() - sample.values[0].double()).abs().max())
        if update:
            idle.discard(sample.group)
        off = float((alone.double() - among.double()).abs().max())
        # kernels over many tensors may add up in another order; a NaN is no less than anything
        last = 2 * torch.finfo(alone.dtype).eps * float(alone.abs().max())
        if not off <= last + 64 * torch.finfo(torch.float32).eps * update:
            raise UserError(
                f"{name} can't be sharded, as its parameters influence each other: a parameter's update among others "
                "is not that of it alone; use an optimizer such as AdamW (or Muon, whose matrices are owned whole), "
                "or turn shard_optimizer and shard_weights off"
            ) from reason
    if idle:
        raise UserError(
            f"{name} can't be sharded, as its step changes nothing when it is given other parameters (one that is "
            "made of other optimizers keeps theirs): use one optimizer with groups, or turn shard_optimizer and "
            "shard_weights off"
        ) from reason
    return states


def _failed(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} can't be sharded, as it failed on parameters of its groups alone ({first_line(error)}): "
        "use an optimizer such as AdamW, or turn shard_optimizer and shard_weights off"
    )


def _stepped(
    optimizer: torch.optim.Optimizer, samples: Sequence[_Sample]
) -> tuple[list[torch.Tensor], list[Mapping[str, Any]]]:
    """Returns values and state of the samples when a copy without state has stepped over them alone."""
    weights = [nn.Parameter(sample.values[0].clone()) for sample in samples]
    groups: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
    for sample, weight in zip(samples, weights, strict=True):
        groups[sample.group].append(weight)
    copy = over(optimizer, list(zip(optimizer.param_groups, groups, strict=True)))
    for step in range(_STEPS):
        for sample, weight in zip(samples, weights, strict=True):
            weight.grad = sample.values[step + 1].clone()
        type(copy).step(copy)
    return [weight.detach() for weight in weights], [dict(copy.state[weight]) for weight in weights]


def _scaled(entries: Mapping[str, Any], sample: _Sample, shape: torch.Size) -> float:
    """Returns the bytes that a sample's state has for a parameter of this shape, which takes the place of its own."""
    tried = sample.values[0].shape
    sides = dict(zip(tried, shape, strict=False)) | {tried.numel(): shape.numel()}
    found = 0.0
    for key, value in entries.items():
        if not isinstance(value, torch.Tensor):
            continue
        if is_elementwise_state(key, value, tried):
            found += shape.numel() * value.element_size()
        else:
            found += math.prod(sides.get(side, side) for side in value.shape) * value.element_size()
    return found
