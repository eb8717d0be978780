"""What every rank sends for a collective of uneven owners, counted from the pieces alone."""

from __future__ import annotations

from collections.abc import Collection

from heteromesh.planner.reduction.reduction import Reduction
from heteromesh.planner.reduction.schedule import pieces, representatives


def sent_bytes(
    reduction: Reduction,
    numel: int,
    itemsize: int,
    *,
    sources: Collection[int] | None,
    spread: bool,
    receivers: Collection[int] | None = None,
    wide: int | None = None,
) -> tuple[int, ...]:
    """Returns by rank the bytes that it sends for a collective (comm/collectives/schedule.py), exactly.

    Args:
        sources: the ranks whose tensors are summed; None: each piece's owner alone (all-gather).
        receivers: of an all-gather; None: all.
        spread: everybody gets the result, else only its owner does (reduce-scatter).
        wide: bytes of an element of a sum, where that is not rounded to the tensor's type on its way (bf16: 4).
    """
    sent = [0] * len(reduction.hosts)
    for piece in pieces(reduction, reduction.bounds(numel), itemsize, one_way=sources is None or not spread):
        count = piece.stop - piece.start
        speakers = representatives(reduction, piece, receivers)
        for host, speaker in speakers.items():
            here = [
                rank
                for rank, its in enumerate(reduction.hosts)
                if its == host and (receivers is None or rank in receivers or rank == piece.owner)
            ]
            giving = [r for r in here if (r == piece.owner if sources is None else r in sources)]
            for rank in giving:
                sent[rank] += count * itemsize * (rank != speaker)
            if speaker != piece.owner:
                sent[speaker] += count * (itemsize if len(giving) == 1 else wide or itemsize) * bool(giving)
                sent[piece.owner] += count * itemsize * spread
            sent[speaker] += count * itemsize * spread * (len(here) - 1)
    return tuple(sent)
