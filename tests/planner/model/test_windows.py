"""Which layers have windows or chunks, by Hugging Face configurations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heteromesh.planner.cost.analytic import model_attention
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.model.spec import MODELS, load_model
from heteromesh.planner.model.windows import local_layers

LAYERS = {"num_hidden_layers": 6}
WINDOW = {"sliding_window": 128}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, {}),
        ({"model_type": "mistral", **WINDOW}, {Mask(window=128): 6}),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"model_type": "qwen3", **WINDOW}, {}),
        ({"model_type": "qwen3", "use_sliding_window": False, **WINDOW}, {}),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4, **WINDOW}, {Mask(window=128): 2}),
        ({"model_type": "gemma2", **WINDOW}, {Mask(window=128): 3}),
        ({"model_type": "gemma3_text", **WINDOW}, {Mask(window=128): 5}),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3, **WINDOW}, {Mask(window=128): 4}),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3, **WINDOW}, {Mask(window=128): 3}),
        ({"layer_types": ["chunked_attention"] * 4 + ["full_attention"] * 2, "attention_chunk_size": 64},
         {Mask(chunk=64): 4}),
        ({"model_type": "llama4_text", "attention_chunk_size": 64}, {Mask(chunk=64): 5}),
        ({"attention_chunk_size": 64, "no_rope_layers": [1, 0, 1, 0, 1, 0]}, {Mask(chunk=64): 3}),
    ],
)  # fmt: skip
def test_layers_of_configurations(config: dict[str, Any], expected: dict[Mask, int]) -> None:
    assert dict(local_layers(LAYERS | config)) == expected


def test_a_config_file_brings_its_windows_into_costs(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, **LAYERS}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma3_text", **shape, **WINDOW}))
    model = load_model(str(path))
    whole = replace(model, local=())
    assert model_attention(model).by_mask() == {Mask(): 1, Mask(window=128): 5}
    assert model_attention(whole).by_mask() == {Mask(): 6}
    assert 6 * model.flops_per_token2() == whole.flops_per_token2()
    # 4 operations per element of a head, query and key
    assert model.local_flops_per_token() == 4 * 4 * 16 * 128 * 5
    toml = tmp_path / "model.toml"
    toml.write_text("".join(f"{key} = {value}\n" for key, value in (shape | WINDOW).items()))
    assert model_attention(load_model(str(toml))).by_mask() == {Mask(window=128): 6}
    assert MODELS["llama-3-8b"].local == ()
