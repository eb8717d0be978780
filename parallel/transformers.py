"""Models of Hugging Face Transformers under a plan: `attn_implementation="heteromesh"`.

    heteromesh.parallel.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="heteromesh")

Inside a pass attention follows the pass's method; elsewhere (evaluation, generation) it is Transformers' own `sdpa`.
Positions come with the pass, so a model needs no change. Checkpoints are the model's own: `save_pretrained`.
"""

from __future__ import annotations

from typing import Any

import torch

from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext, active_pass, attention
from heteromesh.parallel.attention.scope import never_compiled

NAME = "heteromesh"


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
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, S, D), key and value (B, Hk, S, D); returns (B, S, H, D) and no weights."""
    context = active_pass()
    if context is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return out, None
    _refuse_unknown(context, attention_mask, dropout, options)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    return attention(query, key, value, scale=scaling, causal=causal).transpose(1, 2), None


def _mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """Makes no mask in a pass, which knows who sees whom; elsewhere that of `sdpa`."""
    if active_pass() is None:
        from transformers.masking_utils import sdpa_mask

        mask: torch.Tensor | None = sdpa_mask(*args, **options)
        return mask
    given = options.get("attention_mask")
    if given is not None and not bool(given.all()):
        raise ValueError("inside a pass there is no padding and no attention_mask: leave it out")
    return None


def _refuse_unknown(context: PassContext, mask: torch.Tensor | None, dropout: float, options: dict[str, Any]) -> None:
    """Refuses what changes attention and can't be split."""
    if mask is not None:
        raise ValueError("inside a pass attention takes no mask: sequences of a pass never see each other")
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} can't be split over ranks: set attention_dropout=0 in the config"
        )
    window, longest = options.get("sliding_window"), max(context.layout.lengths, default=0)
    if window is not None and longest > window:
        raise ValueError(
            f"a sliding window of {window} tokens can't be split over ranks, and the pass has a sequence of {longest}: "
            "limit sequences to the window, or set sliding_window=None in the config"
        )
    for name in ("softcap", "position_bias", "s_aux", "cache"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name} can't be split over ranks: use a model without it")
