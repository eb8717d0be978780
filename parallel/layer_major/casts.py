"""Which weights autocast casts at every use: these can be held in its dtype, with the same results.

An operation that autocast runs in 16 bit is given a copy of each fp32 weight that was cast just before. Where that is
all that a layer does with a weight, the weight itself may be the cast one: outputs are the same, and its gradient is
what it was before it was cast back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CastNotes(TorchDispatchMode):
    """Notes, while it is active, what becomes of the weights that are watched.

    One pass is to go through a layer from one `watch` to the next. Biases don't count: they are small, and a compiled
    layer need not round the sum that is their gradient.
    """

    supports_higher_order_operators = True

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: of autocast."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._watched: list[tuple[int, int, nn.Parameter]] = []
        """(first address, end, parameter)."""
        self._spans: dict[nn.Parameter, list[tuple[int, int]]] = defaultdict(list)
        """Addresses of what has been cast since and gets a gradient."""
        self._used: set[nn.Parameter] = set()
        self._others: set[nn.Parameter] = set()
        """Those that were used otherwise, too."""

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Looks out for these from now on, where they are now, and for no others."""
        self._spans.clear()
        self._watched = [
            (p.data_ptr(), p.data_ptr() + p.nbytes, p) for p in parameters if p.dtype == torch.float32 and p.dim() > 1
        ]

    @property
    def only_cast(self) -> set[nn.Parameter]:
        """Returns the matrices that were used, each element cast at most once where it gets a gradient."""
        return self._used - self._others

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # a view of a weight is used by whatever is given the view
        if not getattr(func, "is_view", False):
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.numel():
                    self._note(value, func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == self._dtype)
        return func(*args, **kwargs)

    def _note(self, value: torch.Tensor, cast: bool) -> None:
        first = value.data_ptr()
        parameter = next((p for low, high, p in self._watched if low <= first < high), None)
        if parameter is None:
            return
        self._used.add(parameter)
        if parameter.requires_grad and torch.is_grad_enabled():
            reach = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
            last = first + reach * value.element_size()
            # gradients of two casts of the same elements are added up in 32 bit
            cast = cast and not any(first < high and low < last for low, high in self._spans[parameter])
            self._spans[parameter].append((first, last))
        if not cast:
            self._others.add(parameter)
