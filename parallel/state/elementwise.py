"""Whether an optimizer treats every element by itself, found out by trying it: then its work can be cut anywhere."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from heteromesh.errors import UserError
from heteromesh.parallel.state.fragments import mark_fragment

_SHAPE, _CUTS, _STEPS = (6, 7), (0, 13, 42), 3
_RATE = 1e-3
"""The least learning rate that is tried: 16-bit weights don't show what a smaller one does."""


def is_elementwise_state(key: str, value: object, whole: Sequence[int]) -> bool:
    """Says whether an entry of the optimizer state of a parameter of shape `whole` has one value for each element."""
    return isinstance(value, torch.Tensor) and has_value_per_element(key, value.shape, whole)


def has_value_per_element(key: str, shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Says the same of an entry's key and shape."""
    return tuple(shape) == tuple(whole) and key != "step"  # of a parameter without dimensions, one number too


def check_elementwise_group(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: torch.Tensor) -> float:
    """Steps copies of the optimizer over a small tensor, whole and in two parts, each by itself as on two ranks.

    like: a parameter of the group. Returns bytes of state per element. Raises UserError when the two differ in a single
    bit, or when it can't step without more than gradients.
    """
    name = type(optimizer).__name__
    noise = torch.Generator().manual_seed(0)
    device = "cpu" if like.is_meta else like.device  # before a model has weights there is nothing to compare elsewhere
    values = [torch.randn(_SHAPE, generator=noise).to(device, like.dtype) for _ in range(_STEPS + 1)]
    whole = torch.nn.Parameter(values[0].clone())
    flat = values[0].flatten()
    parts = [torch.nn.Parameter(flat[a:b].clone()) for a, b in pairwise(_CUTS)]
    for part, start in zip(parts, _CUTS, strict=False):
        mark_fragment(part, start, flat.numel())
    try:
        one = _copy(optimizer, group, like, whole)
        two = [_copy(optimizer, group, like, part, start) for part, start in zip(parts, _CUTS, strict=False)]
        for value in values[1:]:
            whole.grad = value.clone()
            for part, gradient in zip(parts, value.flatten().split([p.numel() for p in parts]), strict=True):
                part.grad = gradient.clone()
            for each in (one, *two):
                type(each).step(each)
    except Exception as error:
        raise UserError(
            f"{name} can't be sharded, as it failed on a parameter cut in two ({first_line(error)}): "
            "use an element-wise optimizer such as AdamW, or turn shard_optimizer and shard_weights off"
        ) from error
    if not torch.equal(torch.cat([p.detach() for p in parts]), whole.detach().flatten()):
        raise UserError(
            f"{name} can't be sharded, as stepping two halves of a parameter is not the same, bit for bit, as stepping "
            "the whole: use an element-wise optimizer such as AdamW (for SGD, without fused), or turn "
            "shard_optimizer and shard_weights off"
        )
    state = one.state[whole]
    size: int = sum(v.nbytes for k, v in state.items() if is_elementwise_state(k, v, whole.shape))
    return size / whole.numel()


def over(
    optimizer: torch.optim.Optimizer, groups: Sequence[tuple[dict[str, Any], list[torch.nn.Parameter]]]
) -> torch.optim.Optimizer:
    """Returns the same optimizer over other parameters, without state. groups: options and parameters of each."""
    other = object.__new__(type(optimizer))
    other.__dict__.update(optimizer.__dict__)
    other.__dict__.pop("step", None)  # a schedule's wrapper, bound to the original
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(other, hooks, OrderedDict())
    other.param_groups = [_options(group) | {"params": parameters} for group, parameters in groups]
    other.state = defaultdict(dict)
    return other


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a group's options, with a rate under which something happens: warm-ups begin at none."""
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items()}
    rate = own.get("lr")
    if isinstance(rate, torch.Tensor):
        own["lr"] = rate.clamp_min(_RATE)
    elif isinstance(rate, (int, float)):
        own["lr"] = max(rate, _RATE)
    return own


def _copy(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    like: torch.Tensor,
    parameter: torch.nn.Parameter,
    first: int = 0,
) -> torch.optim.Optimizer:
    """Returns the same optimizer over another parameter, with the state of `like`'s elements from `first` on."""
    other = over(optimizer, [(group, [parameter])])
    for key, value in optimizer.state.get(like, {}).items():
        if is_elementwise_state(key, value, like.shape):
            endless = value.flatten().repeat(-(-(first + parameter.numel()) // max(1, value.numel())))
            value = endless[first : first + parameter.numel()].view(parameter.shape).clone()
        elif isinstance(value, torch.Tensor):
            value = value.clone()
        other.state[parameter][key] = value
    return other


def first_line(error: Exception) -> str:
    """Returns the kind of an error and the beginning of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
