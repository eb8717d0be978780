"""Which attention layers of a model see only part of the keys before a query, by a Hugging Face configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from heteromesh.planner.model.mask import CAUSAL, Mask

PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
"""By kind of model, every which layer sees everything where the configuration does not say."""
WINDOW, CHUNK = "sliding_attention", "chunked_attention"
"""Of `layer_types`."""


def local_layers(config: Mapping[str, Any]) -> tuple[tuple[Mask, int], ...]:
    """Returns (mask, layers) of the layers that don't see everything before a query; config: of a config.json."""
    masks = {
        WINDOW: Mask(window=config.get("sliding_window")),
        CHUNK: Mask(chunk=config.get("attention_chunk_size")),
    }
    counts = Counter(masks.get(kind, CAUSAL) for kind in _layer_types(config))
    counts.pop(CAUSAL, None)
    return tuple(counts.items())


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """Returns what Transformers' configurations make of older keys where they don't say `layer_types`."""
    layers, kind = range(config["num_hidden_layers"]), str(config.get("model_type"))
    types = config.get("layer_types")
    if types is not None:
        return list(types)
    if config.get("attention_chunk_size"):
        # Llama-4: layers without rotary embeddings see everything
        rotary = config.get("no_rope_layers") or []
        every = config.get("no_rope_layer_interval") or 4
        return [CHUNK if (rotary[i] if rotary else (i + 1) % every) else "" for i in layers]
    if not config.get("sliding_window"):
        return []
    if "use_sliding_window" in config or kind.startswith("qwen"):
        if not config.get("use_sliding_window"):
            return []
        return [WINDOW if i >= (config.get("max_window_layers") or 0) else "" for i in layers]
    pattern = config.get("sliding_window_pattern") or PATTERNS.get(kind)
    return [WINDOW if not pattern or (i + 1) % pattern else "" for i in layers]
