"""Which of the masks that passes execute a Transformers mask function is.

Transformers describes masks as functions of (batch, head, query, key) that are put together from a few closures. They
are told apart by their code and not by their names, and their parameters are read from their closures: whatever is
not known, an overlay that a model or a script adds included, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner.model.mask import Mask

MaskFunction = Callable[..., Any]
MAKERS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "and": ("and_masks", ()),
    "positions": ("remap_positions_for_packed_sequence", (None, None)),
    "packed": ("packed_sequence_mask_function", (None,)),
    "window": ("sliding_window_overlay", (1,)),
    "chunk": ("chunked_overlay", (1, None)),
}
"""By kind: who makes it in transformers.masking_utils, and arguments to make one with."""


def mask_of(function: MaskFunction) -> Mask:
    """Returns the mask that a mask function of Transformers is. Raises UserError for one that can't be split."""
    known = _known()
    causal, window, chunk = False, None, None
    for kind, part in _parts(function, known):
        values = _closure(part)
        if kind == "causal":
            causal = True
        elif kind == "window":
            window = min(int(values["sliding_window"]), window or int(values["sliding_window"]))
        elif kind == "chunk" and chunk in (None, int(values["chunk_size"])) and not values["left_padding"].any():
            chunk = int(values["chunk_size"])
        elif kind != "everything":
            raise UserError(
                f"the model asks for the attention mask {_name(part)}, and a pass executes causal, sliding-window and "
                "chunked masks: turn it off in the model's config, or train a model without it"
            )
    return Mask(causal=causal, window=window, chunk=chunk)


def _parts(function: MaskFunction, known: dict[CodeType, str]) -> Iterator[tuple[str, MaskFunction]]:
    """Yields (kind, function) of all that must hold; kind empty: not known."""
    kind = known.get(function.__code__, "") if isinstance(function, FunctionType) else ""
    if kind == "and":
        for part in _closure(function)["mask_functions"]:
            yield from _parts(part, known)
    elif kind == "positions":
        # places in a row become positions in the sequence, which is what a pass counts anyway
        yield from _parts(_closure(function)["mask_function"], known)
    elif kind != "packed":  # a pass knows itself which rows are one sequence
        yield kind, function


def _known() -> dict[CodeType, str]:
    from transformers import masking_utils

    known = {
        masking_utils.causal_mask_function.__code__: "causal",
        masking_utils.bidirectional_mask_function.__code__: "everything",
    }
    for kind, (maker, arguments) in MAKERS.items():
        if hasattr(masking_utils, maker):  # some came after version 5.0
            known[getattr(masking_utils, maker)(*arguments).__code__] = kind
    return known


def _closure(function: MaskFunction) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if isinstance(function, FunctionType) else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _name(function: MaskFunction) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
