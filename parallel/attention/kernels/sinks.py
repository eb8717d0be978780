"""Attention sinks: one learnt logit a query head that joins the softmax's denominator and has no value (GPT-OSS).

A sink is one more key whose value is 0, so that it merges into (out, logsumexp) like a block of keys. Flash backwards
that are then called with the merged out and logsumexp stay exact, and the sink's own gradient needs nothing else:
-sum over rows of exp(sink - lse) * rowsum(grad * out).
"""

from __future__ import annotations

import torch


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Merges the sinks (H,) into whole rows, in place: out (n, H, D), lse (n, H) in a wide dtype. None: no sinks."""
    if sinks is None:
        return
    total = torch.logaddexp(lse, sinks.to(lse.dtype))
    out.mul_((lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


def sinks_gradient(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns the gradient of the sinks (H,), given the gradient of out and what `add_sinks` made of out and lse."""
    if sinks is None:
        return None
    wide = lse.dtype
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    return -((sinks.to(wide) - lse).exp() * delta).sum(0).to(sinks.dtype)
