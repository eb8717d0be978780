"""Mask functions of Transformers: those that are known become masks, all others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import masking_utils as masking

from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.parallel.transformers.masks import mask_of
from heteromesh.planner.model.mask import CAUSAL, Mask
from heteromesh.planner.plan import Pass
from ranks import World
from tiny_models import tiny_model

NO_PADDING = torch.zeros(1, dtype=torch.long)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])


def packed(function: Callable[..., Any]) -> Callable[..., Any]:
    ids = masking.find_packed_sequence_indices(POSITIONS)
    return masking.packed_sequence_compatibility_function(function, POSITIONS, ids)


def test_known_ones() -> None:
    windowed = masking.sliding_window_causal_mask_function(7)
    chunked = masking.chunked_causal_mask_function(5, NO_PADDING)
    for function, mask in [
        (masking.causal_mask_function, CAUSAL),
        (masking.bidirectional_mask_function, Mask(causal=False)),
        (windowed, Mask(window=7)),
        (chunked, Mask(chunk=5)),
        (masking.and_masks(windowed, masking.sliding_window_overlay(4)), Mask(window=4)),
        (masking.and_masks(windowed, chunked), Mask(window=7, chunk=5)),
    ]:
        assert mask_of(function) == mask_of(packed(function)) == mask


def impostor(sliding_window: int) -> Callable[..., Any]:
    def inner_mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> bool:
        return kv_idx >= q_idx - sliding_window

    inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
    inner_mask.__module__ = "transformers.masking_utils"
    return inner_mask


@pytest.mark.parametrize(
    "function",
    [
        masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: k % 2 == 0),
        masking.or_masks(masking.causal_mask_function, masking.bidirectional_mask_function),
        masking.and_masks(masking.causal_mask_function, impostor(7)),
        masking.sliding_window_bidirectional_mask_function(7),
        masking.chunked_causal_mask_function(5, torch.tensor([2])),
        masking.and_masks(masking.causal_mask_function, masking.padding_mask_function(torch.ones(1, 5).bool())),
        masking.and_masks(masking.causal_mask_function, masking.blockwise_overlay(torch.zeros(1, 5))),
    ],
)
def test_others_are_refused_by_name(function: Callable[..., Any]) -> None:
    for asked in (function, packed(function)):
        with pytest.raises(UserError, match=r"asks for the attention mask \S+, and a pass executes"):
            mask_of(asked)


def in_a_pass(model: torch.nn.Module, **options: Any) -> torch.Tensor:
    plan = Pass(ranks=(0,), method="local", sequences=(0,), shards=((10,),), seconds=0.0)
    with prepare_pass(plan, (10,), World(), (1.0,)).active():
        logits: torch.Tensor = model(torch.arange(10).view(1, -1), use_cache=False, **options).logits
    return logits


def test_an_overlay_in_a_model_is_refused_before_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as modeling

    model = tiny_model("llama", "heteromesh")

    def every_second(**arguments: Any) -> Any:
        return masking.create_causal_mask(**arguments, and_mask_function=lambda b, h, q, k: k % 2 == 0)

    monkeypatch.setattr(modeling, "create_causal_mask", every_second)
    with pytest.raises(UserError, match="every_second"):
        in_a_pass(model)


def test_a_window_that_the_mask_does_not_say_is_refused() -> None:
    model = tiny_model("qwen3", "heteromesh")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4
    with pytest.raises(UserError, match="sliding_window=4 and its mask for no window"):
        in_a_pass(model)


def test_unknown_keywords_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="attention with position_bias can't be split"):
        in_a_pass(tiny_model("llama", "heteromesh"), position_bias=torch.zeros(1, 4, 10, 10))
