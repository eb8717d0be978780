"""Cuts a decoder into pipeline stages. A stage's parameters keep the whole model's names and are its very tensors.

What can be cut: a module whose child `layers` is an nn.ModuleList that forward goes through in order, with `embed` or
`embed_tokens` before it and `norm` and `head` or `lm_head` after it, on the same module or on the ones around it (as
in Transformers' `model.layers` beside `lm_head`). Other children, such as rotary tables, must have no parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from heteromesh.errors import UserError

BEFORE = ("embed", "embed_tokens")
LAYERS = "layers"
AFTER = ("norm", "head", "lm_head")


class Absent(nn.Module):
    """Stands where a stage has no such module and returns its input: hidden states pass through."""

    weight: torch.Tensor

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        # models look up their embedding's dtype and device
        example = next(like.parameters(), torch.empty(0))
        self.register_buffer("weight", torch.empty(0, dtype=example.dtype, device=example.device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x, unchanged."""
        return x


def cut(model: nn.Module, first: int, last: int) -> nn.Module:
    """Returns the stage with layers first..last (excluded), called as the model is.

    With layer 0 it embeds tokens; without, its first argument is hidden states (1, n, hidden). With the last layer
    it ends as the model does; without, it returns hidden states where the model returns logits. Its state dict is a
    part of the model's. Raises UserError for a model that can't be cut and for a range that is not in it.
    """
    path, layers = find_layers(model)
    if not 0 <= first < last <= len(layers):
        raise UserError(
            f"layers {first} to {last} are no part of a model of {len(layers)} layers: "
            "a stage needs at least one layer and all stages together as many as the model has"
        )
    twin = stage = _twin(model)
    for step, child in enumerate([*path, LAYERS]):
        _drop(twin, child, ".".join(path[:step]), first > 0, last < len(layers))
        if child != LAYERS:
            inner = _twin(twin.get_submodule(child))
            twin.add_module(child, inner)
            twin = inner
    own = nn.ModuleList()
    for index in range(first, last):
        own.add_module(str(index), layers[index])
    twin.add_module(LAYERS, own)
    return stage


def find_layers(model: nn.Module) -> tuple[list[str], nn.ModuleList]:
    """Finds (names from the model to the module that has `layers`, the layers). Raises UserError without any."""
    for name, module in model.named_modules():
        layers = getattr(module, LAYERS, None)
        if isinstance(layers, nn.ModuleList):
            return name.split(".") if name else [], layers
    raise UserError(
        f"{type(model).__name__} has no `layers` in an nn.ModuleList, so it can't be cut into pipeline stages: "
        "name its list of blocks `layers`, or train it without a pipeline"
    )


def embedding_of(model: nn.Module) -> nn.Module:
    """Returns the embedding of a whole model that can be cut."""
    path, _ = find_layers(model)
    for depth in range(len(path), -1, -1):
        around = model.get_submodule(".".join(path[:depth]))
        for name in BEFORE:
            if isinstance(found := getattr(around, name, None), nn.Module):
                return found
    raise UserError(
        f"{type(model).__name__} has no `embed` or `embed_tokens` before its layers, so it can't be cut into pipeline "
        "stages: name its embedding so"
    )


def shared_parameters(model: nn.Module, points: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    """Returns the parameters that the first and the last stage share (tied embeddings), in the order of the first.

    Raises UserError for any other sharing between stages.
    """
    stages = [dict(cut(model, *point).named_parameters()) for point in points]
    owners: dict[nn.Parameter, list[int]] = {}
    for index, parameters in enumerate(stages):
        for name, parameter in parameters.items():
            owners.setdefault(parameter, []).append(index)
            if owners[parameter] not in ([index], [0, len(stages) - 1]):
                raise UserError(
                    f"parameter {name} would be in the pipeline stages {owners[parameter]}: stages may share the "
                    "embedding with the head, so keep modules that share other parameters in one stage"
                )
    return [p for p in stages[0].values() if len(owners[p]) > 1]


def _twin(module: nn.Module) -> nn.Module:
    """Copies the module with tables of its own, so that children can be replaced in it alone."""
    twin = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(module.__dict__[table])
    return twin


def _drop(module: nn.Module, keep: str, where: str, before: bool, after: bool) -> None:
    """Puts `Absent` where a stage has no embedding (before) or no norm and head (after)."""
    for name, child in _with_parameters(module):
        if name == keep:
            continue
        if name not in BEFORE + AFTER:
            full = f"{where}.{name}" if where else name
            raise UserError(
                f"{full} is neither embedding ({', '.join(BEFORE)}) nor layers nor end ({', '.join(AFTER)}) of the "
                "model, so no pipeline stage can own its parameters: rename it, or move it into a layer"
            )
        if (before and name in BEFORE) or (after and name in AFTER):
            module.add_module(name, Absent(child))


def _with_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if own := next((name for name, _ in module.named_parameters(recurse=False)), None):
        raise UserError(
            f"parameter {own} lies beside the layers of the model, so no pipeline stage can own it: move it into a "
            "layer, the embedding or the head"
        )
    for name, child in list(module.named_children()):
        if next(child.parameters(), None) is not None:
            yield name, child
