"""What numbers are summed in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what values of this type are summed in: float32 at least for floating point, else the type itself."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def in_accumulation_dtype(values: torch.Tensor) -> torch.Tensor:
    """Returns the values in `accumulation_dtype`."""
    return values.to(accumulation_dtype(values.dtype))
