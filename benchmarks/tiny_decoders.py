"""Tiny random models of every causal decoder in Transformers: from its configuration class, by the names of fields."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 97
HEADS, DIM = 4, 8
WIDTH = HEADS * DIM
WINDOW = 16
"""Tokens of windows and chunks: fewer than the sequences have, so that they show."""
SPREAD = 0.4
"""Of random weights: with the usual 0.02 errors of attention hardly show in the loss."""
_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size "
    "shape_vocab_size encoder_hash_byte_group_vocab",
    WIDTH: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim backbone_hidden_size lru_width pronunciation_embed_dim shape_embed_dim attention_hidden_size "
    "dim_model_base ple_embed_dim",
    48: "intermediate_size moe_intermediate_size intermediate_size_mlp dense_intermediate_size ffn_dim dff dim_ff "
    "d_inner decoder_ffn_dim encoder_ffn_dim shared_expert_intermediate_size shared_experts_intermediate_size "
    "ffn_hidden_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size feed_forward_size prompt_mid_dim",
    HEADS: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads "
    "linear_num_value_heads mamba_num_heads mamba_n_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts zero_expert_num",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_k moe_topk num_query_groups o_groups mamba_ngroups n_groups split_ngram_parts "
    "num_layers_per_stack",
    DIM: "head_dim d_head dim_head attention_head_dim attention_head_size kv_channels qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
    "index_head_dim rotary_dim query_pre_attn_scalar hidden_size_per_layer_input rel_extent hc_lowrank laurel_rank "
    "adapter_rank router_hidden_size mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank",
    WINDOW: "kv_lora_rank q_lora_rank o_lora_rank sliding_window sliding_window_size attention_window_size "
    "attention_chunk_size window_size local_attention keep_window_size mamba_headdim mamba_d_head mamba_head_dim "
    "local_attention_window_len mamba_chunk_size chunk_size block_size index_topk index_block_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "model_max_length context_length",
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks",
    1: "n_group topk_group num_expert_group moe_num_shared_experts num_shared_experts n_shared_experts mamba_n_groups "
    "first_k_dense_replace num_dense_layers max_window_layers num_nextn_predict_layers",
    64: "mamba_d_ssm original_max_position_embeddings ngram_vocab_size_base block_multiple_of",
    10: "floor_scale log_scaling_n_floor",
    0: "pad_token_id prompt_length",
}
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
TINY = {name: value for value, names in _SIZES.items() for name in names.split()}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hrm_text": {"embedding_scale": 1.0, "H_cycles": 1, "L_cycles": 2, "L_bp_cycles": [2]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"n_mamba_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""Beyond the rules, by architecture."""
MOST_PARAMETERS = 4_000_000


class NoTinyModel(Exception):
    """Its configuration can't be made tiny."""


def tiny_config(kind: str) -> Any:
    """Returns a configuration of an architecture (Transformers' `model_type`). Raises NoTinyModel."""
    from transformers import CONFIG_MAPPING

    try:
        return _tiny(CONFIG_MAPPING[kind], SETTINGS.get(kind, {}))
    except Exception as error:
        raise NoTinyModel(_first_line(error)) from error


def _tiny(made_by: Any, settings: dict[str, Any]) -> Any:
    try:
        fields = dict(vars(made_by()))
    except Exception:
        return made_by(**settings)
    values: dict[str, Any] = {n: TINY[n] for n, v in fields.items() if n in TINY and isinstance(v, int | None)}
    values |= {n: 0.0 for n, v in fields.items() if ("drop" in n or "jitter" in n) and isinstance(v, float)}
    values |= {n: SPREAD for n in ("initializer_range", "init_std") if n in fields}
    values |= {n: True for n in ("is_decoder", "use_sliding_window") if n in fields}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if "qk_rope_head_dim" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = HEADS  # keys are made anew for every head
    values |= settings
    patterns = {n: list(dict.fromkeys(fields[n])) for n in _BY_LAYER if fields.get(n) and n not in settings}
    if patterns:
        layers = max([values.get("num_hidden_layers", 0), *map(len, patterns.values())])
        values["num_hidden_layers"] = layers
        values |= {name: [kinds[i % len(kinds)] for i in range(layers)] for name, kinds in patterns.items()}
    parts = {n: v for n, v in fields.items() if hasattr(v, "to_diff_dict") and n not in settings}
    return made_by(**values, **{n: _tiny(type(v), {}) for n, v in parts.items()})


def tiny_model(kind: str, attention: str) -> torch.nn.Module:
    """Returns the model of an architecture; the same weights each time. Raises NoTinyModel."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    config._attn_implementation = attention
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:
        count = 0  # some can't be made without memory
    if count > MOST_PARAMETERS:
        raise NoTinyModel(f"{count} parameters")
    config = tiny_config(kind)
    experts = {"experts_implementation": "eager"}  # others know no float64
    torch.manual_seed(0)
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)
    except Exception as error:
        raise NoTinyModel(_first_line(error)) from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn_like(parameter)
                parameter.copy_(SPREAD * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.train()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
