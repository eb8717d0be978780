"""Dynamic loss scaling: gradients of fp16 passes are kept where fp16 has digits (arXiv 1710.03740).

The constants are those of torch.amp.GradScaler: the scale is halved in a step whose gradients are not finite, which is
skipped, and doubled after 2000 others in a row. All ranks have the same scale, as they share the gradients' norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from heteromesh.errors import UserError

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000
LEAST = 1.0
"""Below which it isn't the scale that makes gradients overflow."""


@dataclass(slots=True)
class LossScale:
    """By what losses are multiplied before the backward; gradients are divided by it when they have been summed."""

    value: float = 65536.0
    good: int = 0
    """Steps since it was changed last."""

    def check(self, step: int) -> None:
        """Raises UserError where a step whose gradients are not finite can't be cured by a smaller scale."""
        if self.value * BACKOFF < LEAST:
            raise UserError(
                f"gradients are not finite at step {step} even with a loss scale of {self.value:g}, the least: lower "
                "the learning rate or clip_norm, or use precision='bf16' or 'fp32'"
            )

    def settle(self, *, finite: bool) -> None:
        """Takes note of a step. finite: its gradients."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value *= BACKOFF
        elif self.good == INTERVAL:
            self.value, self.good = self.value * GROWTH, 0
