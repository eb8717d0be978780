"""Attention of whole sequences that lie one after the other on one rank."""

from __future__ import annotations

import torch

from heteromesh.parallel.attention.kernels.tiled import tile_attention
from heteromesh.parallel.attention.kernels.tiles import Tile, tiles_between
from heteromesh.parallel.attention.scoring import Scoring
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.splitting.layout import Layout, contiguous
from heteromesh.planner.splitting.masked import masked


class Whole:
    """The attention of one pass's sequences, in any layout's order of them; no exchange."""

    def __init__(self, layout: Layout) -> None:
        self._layout = contiguous(layout.lengths, (layout.lengths,))
        self._tiles: dict[Mask, tuple[Tile, ...]] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n all tokens; returns (1, H, n, D)."""
        if scoring.mask not in self._tiles:
            layout, mask = masked(self._layout, scoring.mask)
            rows = layout.segments[0]
            self._tiles[scoring.mask] = tiles_between(rows, rows, causal=mask.causal, window=mask.window)
        return tile_attention(q, k, v, self._tiles[scoring.mask], scoring, sinks)
