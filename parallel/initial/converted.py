"""Tensors of Transformers' files that its models have otherwise: renamed ones, and experts that are merged into one.

Transformers' own rules say which (`transformers.conversion_mapping`). A tensor of the model is then one or several of
the files, one after the other as they lie in memory: of merged experts each one's gate, then its up projection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from heteromesh.errors import UserError


class StoredWeight(NamedTuple):
    """A tensor in files."""

    parts: tuple[str, ...]
    """The tensors in the files that make it up, one after the other, row-major."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors has it, or several, with commas."""


Found = Mapping[str, tuple[Sequence[int], str]]
"""By name in the files, shape and dtype."""


def converted(model: nn.Module, found: Found) -> dict[str, StoredWeight]:
    """Returns by the names that the model has for them what is in the files.

    Raises UserError for what Transformers would convert in another way than merging experts.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    rules = _rules(inner) if any(k.__name__ == "PreTrainedModel" for k in type(inner).__mro__) else ([], [])
    plain: dict[str, StoredWeight] = {}
    merged: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(found, key=_naturally):
        target, rule, pattern = _renamed(name, *rules)
        if rule is None:
            if target in plain:
                raise UserError(
                    f"the weights have {plain[target].parts[0]} and {name}, both for {target}: leave one of them out"
                )
            plain[target] = StoredWeight((name,), tuple(found[name][0]), found[name][1])
        else:
            merged.setdefault(target, (rule, defaultdict(list)))[1][pattern].append(name)
    return plain | {target: _merged(rule, names, found) for target, (rule, names) in merged.items()}


def _rules(model: Any) -> tuple[list[Any], list[Any]]:
    """Returns Transformers' rules that rename, and those that convert."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # of before there were rules
        return [], []
    rules = get_model_conversion_mapping(model)
    return [r for r in rules if not isinstance(r, WeightConverter)], [
        r for r in rules if isinstance(r, WeightConverter)
    ]


def _renamed(name: str, renamings: Sequence[Any], converters: Sequence[Any]) -> tuple[str, Any, str]:
    """Returns what a tensor is called in the model; the rule that converts it and its pattern that fits, if any."""
    for rule in renamings:
        name, _ = rule.rename_source_key(name)
    for rule in converters:
        target, pattern = rule.rename_source_key(name)
        if pattern is not None:
            return target, rule, pattern
    return name, None, ""


def _merged(rule: Any, names: Mapping[str, list[str]], found: Found) -> StoredWeight:
    columns = [names[pattern] for pattern in rule.source_patterns if pattern in names]
    parts = tuple(name for row in zip(*columns, strict=False) for name in row)
    shapes = [tuple(found[column[0]][0]) for column in columns]
    alike = all(
        tuple(found[name][0]) == shape for column, shape in zip(columns, shapes, strict=True) for name in column
    )
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    merges = steps == [("MergeModulelist", 0)] and len(columns) == 1
    merges |= steps == [("MergeModulelist", 0), ("Concatenate", 1)]
    if not merges or not alike or len({len(column) for column in columns}) != 1 or not all(shapes):
        raise UserError(
            f"the weights have {columns[0][0]}, which Transformers converts as it loads it "
            f"({', '.join(name for name, _ in steps)}): write the files with "
            "model.save_pretrained(folder, save_original_format=False)"
        )
    shape = (len(columns[0]), sum(each[0] for each in shapes), *shapes[0][1:])
    return StoredWeight(parts, shape, ", ".join(sorted({found[name][1] for name in parts})))


def _naturally(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in names as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
