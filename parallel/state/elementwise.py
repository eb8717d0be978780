"""Whether an optimizer treats every element by itself, found out by trying it: only then can its work be sharded."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from heteromesh.errors import UserError
from heteromesh.parallel.state.fragments import mark_fragment

_SHAPE, _CUTS, _STEPS = (6, 7), (0, 13, 42), 3


def is_elementwise_state(key: str, value: object, whole: Sequence[int]) -> bool:
    """Says whether an entry of the optimizer state of a parameter of shape `whole` has one value for each element."""
    return isinstance(value, torch.Tensor) and has_value_per_element(key, value.shape, whole)


def has_value_per_element(key: str, shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Says the same of an entry's key and shape."""
    return tuple(shape) == tuple(whole) and key != "step"  # of a parameter without dimensions, one number too


def check_elementwise(optimizer: torch.optim.Optimizer) -> float:
    """Steps copies of the optimizer over a small tensor, whole and in two parts; returns bytes of state per element.

    Raises UserError when the two differ in a single bit, or when it can't step without more than gradients.
    """
    worst = 0.0
    for group in optimizer.param_groups:
        like = next((p for p in group["params"] if p.requires_grad), None)
        if like is not None:
            worst = max(worst, _check_group(optimizer, group, like))
    return worst


def _check_group(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: torch.Tensor) -> float:
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
        one, two = _copy(optimizer, group, like, [whole]), _copy(optimizer, group, like, parts)
        for value in values[1:]:
            whole.grad = value.clone()
            for part, gradient in zip(parts, value.flatten().split([p.numel() for p in parts]), strict=True):
                part.grad = gradient.clone()
            for each in (one, two):
                type(each).step(each)
    except Exception as error:
        raise UserError(
            f"{name} can't be sharded, as it failed on a parameter cut in two ({_first_line(error)}): "
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


def _copy(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], like: torch.Tensor, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """Returns the same optimizer over other parameters, with the state that `like` has, cut to size."""
    other = object.__new__(type(optimizer))
    other.__dict__.update(optimizer.__dict__)
    other.__dict__.pop("step", None)  # a schedule's wrapper, bound to the original
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(other, hooks, OrderedDict())
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items()}
    other.param_groups = [own | {"params": parameters}]
    other.state = defaultdict(dict)
    first = 0
    for parameter in parameters:
        for key, value in optimizer.state.get(like, {}).items():
            if is_elementwise_state(key, value, like.shape):
                endless = value.flatten().repeat(-(-(first + parameter.numel()) // max(1, value.numel())))
                value = endless[first : first + parameter.numel()].view(parameter.shape).clone()
            elif isinstance(value, torch.Tensor):
                value = value.clone()
            other.state[parameter][key] = value
        first += parameter.numel()
    return other


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
