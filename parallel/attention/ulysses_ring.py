"""Ulysses inside groups of neighbouring ranks (fast links), a ring of keys among the groups (slow ones).

The two-dimensional scheme of USP (arXiv 2405.07719), with the trimmed ring and zigzag groups of any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.parallel.attention.ring import Ring
from heteromesh.parallel.attention.scoring import Scoring
from heteromesh.parallel.attention.ulysses import Trade
from heteromesh.planner.splitting.layout import Layout


class UlyssesRing:
    """The method for one pass: groups of `inner` neighbours share heads, the groups form a trimmed ring."""

    def __init__(self, exchange: Exchange, layout: Layout, groups: Layout, inner: int, speeds: Sequence[float]) -> None:
        """layout: planner.layout.grouped; groups: planner.layout.group_layout of the same shards."""
        group, place = divmod(exchange.member, inner)
        members = range(group * inner, (group + 1) * inner)
        # partners in the ring work on the same heads, so that heads go by place, not by rank
        by_place = [sum(speeds[p::inner]) for p in range(inner)]
        tokens = [layout.tokens(i) for i in members]
        self._trade = Trade(exchange.among(members), tokens, _places(layout, groups, group, members), by_place)
        partners = exchange.among(range(place, len(speeds), inner))
        self._ring = Ring(partners, groups, "trimmed_ring")

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q (1, H, n, D), k and v (1, Hk, n, D), n this rank's tokens; returns (1, H, n, D)."""
        return self._trade(q, k, v, scoring, sinks, self._ring)


def _places(layout: Layout, groups: Layout, group: int, members: range) -> list[int]:
    """Returns the row in the group's block of every token of its members."""
    places: list[int] = []
    for segment in (s for i in members for s in layout.segments[i]):
        row = 0
        for s in groups.segments[group]:
            if s.sequence == segment.sequence and s.start <= segment.start < s.end:
                places.extend(range(row + segment.start - s.start, row + segment.end - s.start))
            row += len(s)
    return places
