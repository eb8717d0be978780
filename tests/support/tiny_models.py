"""Tiny random models of Transformers, and their losses in plain torch: one process, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # with the usual 0.02 errors of attention hardly show in the loss
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_theta": 10_000.0, "original_max_position_embeddings": 64, "factor": 4.0}
LONGROPE = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3 with windows": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "gemma2": ("Gemma2Config", {"sliding_window": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOssConfig", {"sliding_window": 16, **EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3Config",
        # values are narrower than queries and keys
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {"sliding_window": 16, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0, **EXPERTS},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 48,
            "no_rope_layer_interval": 3,
            "floor_scale": 10,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "longrope": ("LlamaConfig", {"rope_parameters": LONGROPE}),
    "dynamic": (
        "LlamaConfig",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
}
"""By name (configuration, its settings beyond SIZES)."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", EXPERTS),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "attn_pdrop": 0.0, "resid_pdrop": 0.1},
    ),
}
"""Likewise, of models whose masks are plain."""


def tiny_model(kind: str, attention: str, **options: Any) -> torch.nn.Module:
    """The same weights in every process."""
    import transformers

    from heteromesh.parallel.transformers import register

    register()
    name, settings = (KINDS | OTHERS)[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(SIZES | settings | options))
    # grouped matrix products know no float64
    experts = {"experts_implementation": "eager"} if kind == "mixtral" else {}
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)


def documents(lengths: Sequence[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def plain_losses(
    model: torch.nn.Module, batches: Sequence[Sequence[torch.Tensor]], optimizer: torch.optim.Optimizer,
    before: Callable[[], None] = lambda: None,
) -> list[float]:  # fmt: skip
    """The loss of every step, by all its valid tokens. `before` runs before every sequence."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        total, valid = 0.0, sum(len(t) - 1 for t in batch)
        for tokens in batch:
            before()
            logits = model(tokens.view(1, -1), use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), tokens[1:], reduction="sum") / valid
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        optimizer.step()
    return losses
