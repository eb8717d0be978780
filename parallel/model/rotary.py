"""Rotary frequencies that follow the length of each sequence.

The `longrope` and `dynamic` embeddings of Transformers choose their frequencies by the largest position of a call, and
`dynamic` ones remember the largest so far. A pass holds sequences of many lengths, or part of one: there the embedding
is computed again for the sequences of each length as if they were alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext, active_pass


def follow_lengths(model: nn.Module) -> list[Any]:
    """Adds to every such embedding of the model what corrects it in passes; returns the hooks that are new."""
    return [
        module.register_forward_hook(_per_sequence, with_kwargs=True)
        for module in model.modules()
        if any(map(_follows_length, _rope_types(module).values()))
        and _per_sequence not in module._forward_hooks.values()
    ]


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """Returns the kinds of rotary embedding of a module, by type of layer (None: one for all)."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {None: kinds}
    return kinds if isinstance(kinds, dict) else {}


def _follows_length(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


def _per_sequence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook: args are (x, position_ids[, layer_type]), output a tensor or tensors (..., tokens, dim)."""
    context = active_pass()
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    layer = given.get("layer_type")
    if context is None or not context.tokens or not _follows_length(_rope_types(module).get(layer)):
        return output
    positions = given.pop("position_ids")

    def forward(own: torch.Tensor) -> Any:
        _forget(module, layer)
        return module.forward(position_ids=own, **given)

    result = _by_length(context, positions, forward, type(module).__name__)
    _forget(module, layer)
    return result


def _by_length(context: PassContext, positions: torch.Tensor, forward: Callable[[torch.Tensor], Any], name: str) -> Any:
    """Returns what `forward` makes of positions (..., n), called once for the sequences of each length."""
    places: dict[int, list[torch.Tensor]] = {}
    row = 0
    for s in context.layout.segments[context.member]:
        rows = torch.arange(row, row + len(s), device=positions.device)
        # a sequence may begin at another position than 0
        end = int(positions[..., row].max()) - s.start + context.layout.lengths[s.sequence]
        places.setdefault(end, []).append(rows)
        row += len(s)
    parts: list[tuple[torch.Tensor, ...]] = []
    for end, ranges in places.items():
        own = positions[..., torch.cat(ranges)]
        # the sequence's last position, which another rank may hold
        last = torch.full_like(own[..., :1], end - 1)
        out = forward(torch.cat([own, last], -1))
        parts.append(out if isinstance(out, tuple) else (out,))
        if any(t.dim() < 2 or t.shape[-2] != own.shape[-1] + 1 for t in parts[-1]):
            raise UserError(
                f"{name} gives {[tuple(t.shape) for t in parts[-1]]} for {own.shape[-1] + 1} positions, which can't be "
                "put together by sequence: use a model whose rotary embedding gives (..., tokens, dim)"
            )
    order = torch.cat([rows for ranges in places.values() for rows in ranges]).argsort()
    joined = tuple(torch.cat([t[..., :-1, :] for t in ts], -2)[..., order, :] for ts in zip(*parts, strict=True))
    return joined if isinstance(out, tuple) else joined[0]


def _forget(module: nn.Module, layer: str | None) -> None:
    """Resets what a `dynamic` embedding remembers of longer sequences."""
    if "dynamic" not in _rope_types(module)[layer]:
        return
    prefix = f"{layer}_" if layer else ""
    frequencies: torch.Tensor = getattr(module, f"{prefix}inv_freq")
    original: torch.Tensor = getattr(module, f"{prefix}original_inv_freq")
    module.register_buffer(f"{prefix}inv_freq", original.to(frequencies.device), persistent=False)
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
