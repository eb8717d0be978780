"""torch.nn.functional's dropouts inside a pass: the same laws, drawn by `Draws`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as functional

from heteromesh.errors import UserError
from heteromesh.parallel.attention.scope import never_compiled
from heteromesh.parallel.model.counter import LEVELS
from heteromesh.parallel.model.draws import active_draws

_BY_ELEMENT = ("dropout", "alpha_dropout")
_BY_CHANNEL = ("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")
_WITHOUT_SAMPLES = (("dropout1d", 2), ("dropout3d", 4))
"""Dropouts by channel and dimensions of an input that is one sample."""
_ALPHA = 1.7580993408473766
"""What a SELU tends to for very negative inputs, negated: an alpha dropout sets elements to it."""


@contextmanager
def dropouts_replaced() -> Iterator[None]:
    """Makes torch's functional dropouts, which its modules call, draw from the active pass within the block.

    Several threads may be inside at once, each in a pass of its own or in none.
    """
    _replaced.enter()
    try:
        yield
    finally:
        _replaced.leave()


class _Replacement:
    """Puts functions into torch.nn.functional while anybody is inside."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._originals = {n: getattr(functional, n) for n in (*_BY_ELEMENT, *_BY_CHANNEL)}
        self._originals["scaled_dot_product_attention"] = functional.scaled_dot_product_attention
        self._ours = {n: _drawn_by_token(n, f) for n, f in self._originals.items() if "dropout" in n}
        self._ours["scaled_dot_product_attention"] = _without_dropout(functional.scaled_dot_product_attention)

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                vars(functional).update(self._ours)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                vars(functional).update(self._originals)


def _drawn_by_token(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    trains = inspect.signature(original).parameters["training"].default

    @never_compiled
    @wraps(original)
    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = trains, inplace: bool = False) -> torch.Tensor:
        draws = active_draws()
        if draws is None or not training or not 0.0 < p < 1.0:
            return original(input, p, training, inplace)
        if draws.is_foreign:
            draws.number()
            return input
        level = min(LEVELS - 1, max(1, round(p * LEVELS)))
        mask = draws.dropped(level, _drawn_shape(name, input.shape), name)
        x = input if inplace else input.clone()
        return _alpha(x, mask, level) if "alpha" in name else x.mul_(LEVELS / (LEVELS - level)).masked_fill_(mask, 0.0)

    return dropout


def _drawn_shape(name: str, shape: torch.Size) -> list[int]:
    """Returns the shape of what is drawn: one number an element, or one a channel of each sample."""
    if name in _BY_ELEMENT:
        return list(shape)
    drawn = 1 if (name, len(shape)) in _WITHOUT_SAMPLES else 2
    return [*shape[:drawn], *[1] * (len(shape) - drawn)]


def _alpha(x: torch.Tensor, mask: torch.Tensor, level: int) -> torch.Tensor:
    """Sets what is masked to the SELU's limit and brings mean and variance back, in place."""
    p = level / LEVELS
    scale = ((_ALPHA * _ALPHA * p + 1.0) * (1.0 - p)) ** -0.5
    return x.masked_fill_(mask, -_ALPHA).add_(_ALPHA * p).mul_(scale)


def _without_dropout(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @never_compiled
    @wraps(original)
    def attention(*args: Any, **options: Any) -> torch.Tensor:
        p = args[4] if len(args) > 4 else options.get("dropout_p", 0.0)
        if p and active_draws() is not None:
            raise UserError(
                f"scaled_dot_product_attention with dropout_p {p} in a pass: dropout of attention's probabilities "
                "can't be drawn by token, whatever the plan; set it to 0 and call hm.attention"
            )
        return original(*args, **options)

    return attention


_replaced = _Replacement()
