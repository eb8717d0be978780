"""How many members a job may have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The least and the largest number of members. Those beyond the maximum wait as spares."""

    min: int = 1
    max: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max <= 256:
            raise ValueError(f"members must be bounded by 1 <= MIN <= MAX <= 256, got {self.min}:{self.max}")
