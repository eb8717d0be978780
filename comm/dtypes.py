"""What numbers are summed in."""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of values of this type are kept in: float32 at least for floating point, else the type itself."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def wide(values: torch.Tensor) -> torch.Tensor:
    """The values in `wide_dtype`."""
    return values.to(wide_dtype(values.dtype))
