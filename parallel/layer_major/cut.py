"""Where a pass's graph is cut: what a layer gave is the beginning of a new part of it, whose gradients are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class StoresGradients(Protocol):
    """Whose outputs they are."""

    def store(self, index: int, gradient: torch.Tensor) -> None:
        """Takes a gradient of output `index`; several are added up."""


def cut_off(outputs: Sequence[torch.Tensor], owner: StoresGradients) -> list[torch.Tensor]:
    """Returns the outputs as the beginnings of a graph; a backward that comes to them ends in `owner.store`."""
    # a fresh leaf makes what comes out need gradients, whatever went into the layer
    anchor = torch.empty(0, requires_grad=True)
    # detached: a view of something else could not be changed in place
    return list(_Cut.apply(anchor, owner, [t.detach() for t in outputs]))  # type: ignore[no-untyped-call]


def owner_of(node: Any) -> Any:
    """Returns the owner of the outputs that a node of the graph is the beginning of; None for any other node."""
    return getattr(node, "cut_owner", None)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, owner: StoresGradients, outputs: list[torch.Tensor]) -> Any:
        ctx.cut_owner = owner
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in outputs if not (t.is_floating_point() or t.is_complex())))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, None, None]:
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                ctx.cut_owner.store(index, gradient)
        return None, None, None
