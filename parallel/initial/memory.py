"""Memory for parameters of the meta device: the same objects, so that optimizers and tied modules still have them."""

from __future__ import annotations

import torch
from torch import nn

from heteromesh.errors import UserError


def give_memory(parameter: nn.Parameter, data: torch.Tensor, name: str) -> None:
    """Has a parameter use `data` from here on, whether it is on the meta device, without elements or whole.

    Raises UserError for a parameter that can't, by its name.
    """
    if not parameter.is_meta:
        parameter.data = data
        return
    fresh = nn.Parameter(data, requires_grad=parameter.requires_grad)
    fresh.__dict__.update(parameter.__dict__)
    try:
        # `.data` of the meta device takes nothing from another one
        torch.utils.swap_tensors(parameter, fresh)
    except RuntimeError as error:
        raise UserError(
            f"parameter {name} is on the meta device and can't be moved from there ({str(error).splitlines()[0]}): "
            "build this module with real weights"
        ) from error


def check_parameter(parameter: nn.Parameter, name: str) -> None:
    """Raises UserError for a parameter that can't begin on the meta device: one with hooks, or without floats."""
    if not parameter.is_floating_point():
        raise UserError(
            f"parameter {name} is on the meta device and {str(parameter.dtype).removeprefix('torch.')}, and only float "
            "weights can begin there: build the model with real weights"
        )
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise UserError(
            f"parameter {name} is on the meta device and has hooks on its gradient, which it would lose when it gets "
            "memory: take them off, or build the model with real weights"
        )
