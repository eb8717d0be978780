"""The attention and mask functions that Transformers calls for `attn_implementation="heteromesh"`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional

from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import active_pass, attention
from heteromesh.parallel.attention.scope import never_compiled
from heteromesh.parallel.attention.scoring import default_scale
from heteromesh.parallel.transformers.llama4 import scaled_by_position
from heteromesh.parallel.transformers.masks import mask_of
from heteromesh.parallel.transformers.outside import formula
from heteromesh.planner.model.mask import CAUSAL, Mask

NAME = "heteromesh"
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Keywords that reach attention and don't change what it computes."""


def register() -> None:
    """Makes `attn_implementation="heteromesh"` known to Transformers. Raises UserError where it is not installed."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        raise UserError(
            "transformers is not installed, or older than 5: install it with `pip install heteromesh[transformers]`"
        ) from None
    # no part of compiled graphs: each pass attends in another way
    AttentionInterface.register(NAME, never_compiled(_forward))
    AttentionMaskInterface.register(NAME, never_compiled(_mask))


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Mask | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, S, D), key (B, Hk, S, D), value (B, Hk, S, Dv); returns (B, S, H, Dv) and no weights.

    s_aux (H,): attention sinks. `sliding_window` is for attention that gets no mask; here the mask says it too.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if active_pass() is None:
        assert not isinstance(attention_mask, Mask), "a mask made inside a pass is used outside it"
        if softcap is not None or s_aux is not None:
            drop = dropout if module.training else 0.0
            out = formula(query, key, value, attention_mask, scaling, causal, softcap, s_aux, drop)
            return out.transpose(1, 2).contiguous(), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return out, None
    if isinstance(attention_mask, torch.Tensor):
        raise UserError(
            f"the model gives attention a mask of shape {tuple(attention_mask.shape)}, and inside a pass attention "
            "takes no mask: sequences of a pass never see each other, leave attention_mask out"
        )
    mask = attention_mask or Mask(causal=causal)
    _refuse_unknown(mask, sliding_window, dropout, options)
    scale, width = default_scale(scaling, query.shape[-1]), value.shape[-1]
    query, key, value = _of_one_width(scaled_by_position(module, query), key, value)
    out = attention(
        query, key, value, scale=scale, causal=mask.causal, window=mask.window, chunk=mask.chunk, sinks=s_aux,
        softcap=softcap,
    )  # fmt: skip
    return out[..., :width].transpose(1, 2), None


def _of_one_width(*heads: torch.Tensor) -> list[torch.Tensor]:
    """Returns queries, keys and values with zeros behind the narrower ones: latent attention's differ (DeepSeek's)."""
    most = max(t.shape[-1] for t in heads)
    return [functional.pad(t, (0, most - t.shape[-1])) if t.shape[-1] < most else t for t in heads]


def _mask(*args: Any, **options: Any) -> torch.Tensor | Mask | None:
    """Returns in a pass what queries see beyond the pass's own rule (None: causal); elsewhere the mask of `sdpa`."""
    if active_pass() is None:
        from transformers.masking_utils import sdpa_mask

        tensor: torch.Tensor | None = sdpa_mask(*args, **options)
        return tensor
    given = options.get("attention_mask")
    if given is not None and not bool(given.all()):
        raise UserError(
            f"attention_mask hides {int((~given.bool()).sum())} of {given.numel()} tokens, and inside a pass there is "
            "no padding and no attention_mask: leave it out and give each sequence without its padding"
        )
    mask = mask_of(options["mask_function"]) if "mask_function" in options else CAUSAL
    return None if mask == CAUSAL else mask


def _refuse_unknown(mask: Mask, sliding_window: int | None, dropout: float, options: dict[str, Any]) -> None:
    """Refuses what changes attention and can't be split."""
    if dropout:
        raise UserError(f"attention dropout {dropout} can't be split over ranks: set attention_dropout=0 in the config")
    if sliding_window is not None and sliding_window != mask.window:
        raise UserError(
            f"a layer asks for sliding_window={sliding_window} and its mask for {mask.window or 'no window'}: "
            "they must be the same, set both in the config (sliding_window, layer_types) or neither"
        )
    for name, value in options.items():
        if name not in HARMLESS and value is not None and value is not False:
            raise UserError(f"attention with {name} can't be split over ranks: use a model without it")
