"""The pieces that a reduction's tensor travels in, and who speaks for which host."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from heteromesh.planner.reduction.reduction import Reduction

PIECES = 64
"""Per owner that works at a time: the first and the last travel one way only, so the time lost is about 1 / PIECES."""
LEAST_BYTES = 32 << 10
"""Of a piece; below, a message costs more than its bytes."""
ONE_WAY_PIECES, ONE_WAY_LEAST_BYTES = 16, 256 << 10
"""Of gathers and scatters, whose pieces have no way back to wait for: a message costs 0.1 to 0.2 ms of processor time
at its two ends, and a model's weights travel every step."""
MOST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ReductionPiece:
    """Elements [start, stop) of the tensor, summed by one owner."""

    start: int
    stop: int
    owner: int
    number: int


def pieces(
    reduction: Reduction, bounds: Sequence[int], itemsize: int, *, one_way: bool = False
) -> tuple[ReductionPiece, ...]:
    """Returns all pieces, in the order in which everybody works: owners of a wave take turns and end at about the same
    time.

    bounds: size + 1 offsets, rank i owns [bounds[i], bounds[i + 1]). one_way: for a gather or a scatter, not for a sum
    that every rank gets.
    """
    most, least = (ONE_WAY_PIECES, ONE_WAY_LEAST_BYTES) if one_way else (PIECES, LEAST_BYTES)
    ranges = [(owner, low, high) for owner, (low, high) in enumerate(itertools.pairwise(bounds)) if low < high]
    waves = reduction.waves or (0,) * len(reduction.fractions)
    together = max(Counter(waves[owner] for owner, _, _ in ranges).values(), default=1)
    size = -(-bounds[-1] * itemsize // (most * together))
    step = max(min(max(size, least), MOST_BYTES) // itemsize, 1)
    cuts: list[tuple[int, float, int, int, int]] = []
    for owner, low, high in ranges:
        count = -(-(high - low) // step)
        for i in range(count):
            start, stop = low + (high - low) * i // count, low + (high - low) * (i + 1) // count
            cuts.append((waves[owner], (i + 0.5) / count, owner, start, stop))
    cuts.sort()
    return tuple(ReductionPiece(low, high, owner, number) for number, (_, _, owner, low, high) in enumerate(cuts))


def members_by_host(
    reduction: Reduction, piece: ReductionPiece, among: Collection[int] | None = None
) -> dict[int, list[int]]:
    """Returns by host the ranks that have to do with a piece: its owner and these ranks; None: all."""
    members: dict[int, list[int]] = {}
    for rank, host in enumerate(reduction.hosts):
        if among is None or rank in among or rank == piece.owner:
            members.setdefault(host, []).append(rank)
    return members


def representatives(
    reduction: Reduction, piece: ReductionPiece, among: Collection[int] | None = None
) -> dict[int, int]:
    """Returns by host the rank that speaks for it about this piece: the owner on its host, elsewhere in turn the ranks
    that have to do with it, as in `members_by_host`.
    """
    members = members_by_host(reduction, piece, among)
    chosen = {host: ranks[piece.number % len(ranks)] for host, ranks in members.items()}
    chosen[reduction.hosts[piece.owner]] = piece.owner
    return chosen
