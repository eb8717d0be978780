"""The whole optimizer state on every rank, but not all of it in memory: the optimizer keeps it on lower tiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.parallel.state.fragmented import FragmentedOptimizer
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.parallel.state.owner import Replicated, StoredState


class Offloaded(Replicated):
    """`Replicated` for an optimizer that `KeepsPieces`: checkpoints are read and written piece by piece.

    The checkpoints are those of every other state owner. State that the optimizer has already is kept.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, buckets: Sequence[Bucket] = ()) -> None:
        super().__init__(optimizer, model, buckets)
        names = {p: name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
        self._pieces = FragmentedOptimizer(optimizer, names)
        before = optimizer.state_dict()
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        # each parameter is one fragment, in the place where it is
        self._pieces.hold([Fragment(p, p.shape, 0, p, 0, 0) for p in trained])
        self._pieces.load_state_dict(before)

    def checkpoint_entries(self) -> dict[str, Any]:
        return self._pieces.checkpoint_entries()

    def checkpoint_buffers(self, stored: StoredState) -> dict[str, Any]:
        return self._pieces.checkpoint_buffers(stored)

    def load_entries(self, entries: dict[str, Any], stored: StoredState) -> None:
        self._pieces.load_entries(entries)

    def close(self) -> None:
        """Gives the optimizer all of its parameters back, but no state: that is in checkpoints."""
        self._pieces.restore()
