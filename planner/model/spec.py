"""What a model costs per token, from its shape alone: parameters, operations and activation bytes.

Shapes come from a built-in name, a Hugging Face config.json, or TOML with the same fields (docs/command-line.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner import files
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.model.windows import local_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer; raises UserError where the numbers don't fit each other."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP, or of one expert."""
    vocab: int
    experts: int = 0
    """Experts per layer; 0: a dense MLP."""
    experts_per_token: int = 0
    tied_embeddings: bool = False
    gated_mlp: bool = True
    """Gate, up and down matrices (SwiGLU); False: up and down only (GPT)."""
    local: tuple[tuple[Mask, int], ...] = ()
    """(mask, layers) of those whose queries see only part of the keys before them."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"model {self.name}: {self.heads} query heads can't share {self.kv_heads} key/value heads evenly: "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.experts_per_token > self.experts or bool(self.experts) != bool(self.experts_per_token):
            raise UserError(
                f"model {self.name}: {self.experts_per_token} of {self.experts} experts per token is not possible: "
                "num_experts_per_tok must be from 1 to num_local_experts, or both left out"
            )

    @property
    def active_experts(self) -> int:
        """MLPs that a token goes through in a layer."""
        return self.experts_per_token or 1

    def parameters(self) -> int:
        """Counts all parameters: embeddings, layers, norms and output head."""
        return self.layers * self.layer_parameters + self.outer_parameters

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: projections, MLP or experts with their router, two norms."""
        mlps = self.experts * self._mlp + self.hidden * self.experts if self.experts else self._mlp
        return self._projections + mlps + 2 * self.hidden

    @property
    def outer_parameters(self) -> int:
        """Parameters outside layers: embeddings, output head and the last norm."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2) + self.hidden

    def flops_per_token(self) -> int:
        """Returns the forward operations of matrices per token: 2 per weight that a token meets."""
        router = self.hidden * self.experts
        layer = self._projections + self.active_experts * self._mlp + router
        return 2 * (self.layers * layer + self.vocab * self.hidden)

    def flops_per_token2(self) -> int:
        """Counts forward operations of causal attention per squared token: half of 4 * heads * head_dim a layer.

        Layers whose queries see a window or a chunk are not in it: see `local_flops_per_token`.
        """
        return 2 * (self.layers - sum(n for _, n in self.local)) * self.heads * self.head_dim

    def local_flops_per_token(self) -> float:
        """Returns the forward operations per token of attention to windows and chunks; too many in short sequences."""
        return 4 * self.heads * self.head_dim * sum((mask.span or 0.0) * n for mask, n in self.local)

    def activation_bytes_per_token(self, *, checkpointing: bool = False) -> int:
        """Returns the bytes kept for backward per token, bf16, with attention that keeps no scores (flash).

        Without checkpointing: the inputs of every matrix, norm and activation, and the loss on top. With it: the input
        of each layer, and one layer in full or the loss, whichever is more.
        """
        if checkpointing:
            return self.layers * self.layer_input_bytes + max(self.layer_activation_bytes, self.loss_bytes)
        return self.layers * self.layer_activation_bytes + self.loss_bytes

    @property
    def layer_input_bytes(self) -> int:
        """Bytes of a layer's input per token, bf16."""
        return 2 * self.hidden

    @property
    def loss_bytes(self) -> int:
        """Bytes per token while the loss is formed, when all activations are there: logits in bf16 and in fp32, their
        log-softmax and its gradient in fp32.
        """
        return 14 * self.vocab

    @property
    def layer_activation_bytes(self) -> int:
        """Bytes that one layer keeps for backward per token, bf16."""
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        mlp = (4 if self.gated_mlp else 2) * self.intermediate * self.active_experts
        routed = 2 * self.hidden * self.active_experts if self.experts else 0
        return 2 * (4 * self.hidden + attention + mlp + routed)

    @property
    def _projections(self) -> int:
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim

    @property
    def _mlp(self) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden * self.intermediate


def _gpt(name: str, layers: int, hidden: int, heads: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        vocab=50_257,
        gated_mlp=False,
    )


def _llama(
    name: str, layers: int, hidden: int, heads: int, intermediate: int, vocab: int, experts: int = 0
) -> ModelSpec:
    return ModelSpec(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        intermediate=intermediate,
        vocab=vocab,
        experts=experts,
        experts_per_token=2 if experts else 0,
    )


MODELS: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _gpt("gpt-7b", 32, 4096, 32),
            _gpt("gpt-13b", 40, 5120, 40),
            _gpt("gpt-30b", 60, 6656, 52),
            _llama("llama-3-8b", 32, 4096, 32, 14_336, 128_256),
            _llama("llama-3-70b", 80, 8192, 64, 28_672, 128_256),
            _llama("mixtral-8x7b", 32, 4096, 32, 14_336, 32_000, experts=8),
            _llama("qwen3-8b", 36, 4096, 32, 12_288, 151_936),
        )
    }
)
"""Built-in shapes; the gpt ones are FlexSP's (arXiv 2412.01523, section 6) without their position tables."""


def load_model(name_or_path: str) -> ModelSpec:
    """Loads a built-in model, a Hugging Face config.json (`.json`) or the same fields as TOML (`.toml`)."""
    if name_or_path in MODELS:
        return MODELS[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".toml":
        where = f"model file {path}"
        raw = files.build(_Fields, files.read_toml(path, "model file"), where)
        return _spec(raw, path.stem, where, local_layers(asdict(raw)))
    if path.suffix == ".json":
        return _from_config(path)
    raise UserError(
        f"model {name_or_path!r} is not built in: use one of {', '.join(MODELS)}, a Hugging Face config.json or a .toml"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """Hugging Face's names (those of a Llama, Qwen or Mixtral config), and `gated_mlp`."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    num_local_experts: int = field(default=0, metadata=files.ZERO)
    num_experts_per_tok: int = field(default=0, metadata=files.ZERO)
    tie_word_embeddings: bool = False
    gated_mlp: bool = True
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_types: tuple[str, ...] | None = None


_ALIASES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "num_experts": "num_local_experts",
    "moe_intermediate_size": "intermediate_size",
}
"""Other names that config.json files use, and ours; a later one overrides an earlier one's value."""
_UNGATED = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "starcoder2")
_TIED = ("bloom", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "opt")
"""Kinds whose config.json leaves tie_word_embeddings out because it is true by default."""


def _from_config(path: Path) -> ModelSpec:
    text = files.read_text(path, "model file")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"model file {path} line {error.lineno} is not JSON ({error.msg}): correct that line") from None
    where = f"model file {path}"
    if not isinstance(data, Mapping):
        raise UserError(f"{where} holds no JSON object: give a Hugging Face config.json")
    data = data.get("text_config") or data
    if data.get("kv_lora_rank"):
        raise UserError(
            f"{where}: latent attention (kv_lora_rank) is not described yet: "
            "write a .toml with the head counts and sizes that come closest"
        )
    known: dict[str, Any] = {k: v for k, v in data.items() if k in _Fields.__dataclass_fields__ and v is not None}
    known |= {ours: data[theirs] for theirs, ours in _ALIASES.items() if data.get(theirs) is not None}
    kind = data.get("model_type")
    known.setdefault("tie_word_embeddings", kind in _TIED)
    known["gated_mlp"] = kind not in _UNGATED
    raw = files.build(_Fields, known, where)
    local = local_layers({**data, "num_hidden_layers": raw.num_hidden_layers})
    return _spec(raw, path.parent.name or path.stem, where, local)


def _spec(raw: _Fields, name: str, where: str, local: tuple[tuple[Mask, int], ...]) -> ModelSpec:
    if raw.head_dim is None and raw.hidden_size % raw.num_attention_heads:
        raise UserError(
            f"{where}: hidden_size {raw.hidden_size} is not a multiple of num_attention_heads "
            f"{raw.num_attention_heads}: correct one of them or give head_dim"
        )
    return ModelSpec(
        name=name,
        layers=raw.num_hidden_layers,
        hidden=raw.hidden_size,
        heads=raw.num_attention_heads,
        kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
        head_dim=raw.head_dim or raw.hidden_size // raw.num_attention_heads,
        intermediate=raw.intermediate_size or 4 * raw.hidden_size,
        vocab=raw.vocab_size,
        experts=raw.num_local_experts,
        experts_per_token=raw.num_experts_per_tok,
        tied_embeddings=raw.tie_word_embeddings,
        gated_mlp=raw.gated_mlp,
        local=local,
    )
