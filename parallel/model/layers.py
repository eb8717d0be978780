"""A model's layers: what is recomputed, cut into stages and named when random numbers are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from heteromesh.parallel.model.call import plain_name


def outermost_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the elements of the model's outermost module lists, by qualified name; {} where it has none.

    torch.compile's wrappers are no part of the names: a compiled model draws what it draws uncompiled.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {plain_name(f"{name}.{child}"): layer for name in outer for child, layer in lists[name].named_children()}


def own_parameters(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[list[nn.Parameter]]:
    """Returns by layer its parameters; those that something else has too (tied weights) are no layer's."""
    inside = [dict.fromkeys(layer.parameters()) for layer in layers.values()]
    skipped = {module for layer in layers.values() for module in layer.modules()}
    outside = {p for m in model.modules() if m not in skipped for p in m.parameters(recurse=False)}
    counts = Counter(p for own in inside for p in own)
    return [[p for p in own if counts[p] == 1 and p not in outside] for own in inside]
