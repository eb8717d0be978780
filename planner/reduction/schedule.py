"""The pieces that a reduction's tensor travels in, and what every rank sends for them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from heteromesh.planner.reduction.reduction import Reduction

PIECES = 64
"""Per owner that works at a time: the first and the last travel one way only, so the time lost is about 1 / PIECES."""
LEAST_BYTES = 32 << 10
"""Of a piece; below, a message costs more than its bytes."""
MOST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ReductionPiece:
    """Elements [start, stop) of the tensor, summed by one owner."""

    start: int
    stop: int
    owner: int
    number: int


def pieces(reduction: Reduction, numel: int, itemsize: int) -> tuple[ReductionPiece, ...]:
    """Returns all pieces, in the order in which everybody works: owners of a wave take turns and end at about the same
    time.
    """
    bounds = reduction.bounds(numel)
    ranges = [(owner, low, high) for owner, (low, high) in enumerate(itertools.pairwise(bounds)) if low < high]
    waves = reduction.waves or (0,) * len(reduction.fractions)
    together = max(Counter(waves[owner] for owner, _, _ in ranges).values(), default=1)
    size = -(-numel * itemsize // (PIECES * together))
    step = max(min(max(size, LEAST_BYTES), MOST_BYTES) // itemsize, 1)
    cuts: list[tuple[int, float, int, int, int]] = []
    for owner, low, high in ranges:
        count = -(-(high - low) // step)
        for i in range(count):
            start, stop = low + (high - low) * i // count, low + (high - low) * (i + 1) // count
            cuts.append((waves[owner], (i + 0.5) / count, owner, start, stop))
    cuts.sort()
    return tuple(ReductionPiece(low, high, owner, number) for number, (_, _, owner, low, high) in enumerate(cuts))


def representatives(reduction: Reduction, piece: ReductionPiece) -> dict[int, int]:
    """Returns by host the rank that speaks for it about this piece: the owner on its host, elsewhere the ranks in
    turn.
    """
    members: dict[int, list[int]] = {}
    for rank, host in enumerate(reduction.hosts):
        members.setdefault(host, []).append(rank)
    chosen = {host: ranks[piece.number % len(ranks)] for host, ranks in members.items()}
    chosen[reduction.hosts[piece.owner]] = piece.owner
    return chosen


def sent_bytes(
    reduction: Reduction,
    numel: int,
    itemsize: int,
    *,
    sources: Collection[int] | None,
    spread: bool,
    wide: int | None = None,
) -> tuple[int, ...]:
    """Returns by rank the bytes that it sends for a collective (comm/collectives/schedule.py), exactly.

    Args:
        sources: the ranks whose tensors are summed; None: each piece's owner alone (all-gather).
        spread: everybody gets the result, else only its owner does (reduce-scatter).
        wide: bytes of an element of a sum, where that is not rounded to the tensor's type on its way (bf16: 4).
    """
    sent = [0] * len(reduction.hosts)
    for piece in pieces(reduction, numel, itemsize):
        count = piece.stop - piece.start
        speakers = representatives(reduction, piece)
        for host, speaker in speakers.items():
            here = [rank for rank, its in enumerate(reduction.hosts) if its == host]
            giving = [r for r in here if (r == piece.owner if sources is None else r in sources)]
            for rank in giving:
                sent[rank] += count * itemsize * (rank != speaker)
            if speaker != piece.owner:
                sent[speaker] += count * (itemsize if len(giving) == 1 else wide or itemsize) * bool(giving)
                sent[piece.owner] += count * itemsize * spread
            sent[speaker] += count * itemsize * spread * (len(here) - 1)
    return tuple(sent)
