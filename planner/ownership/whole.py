"""Whole matrices per owner: which rank owns which parameter, where an optimizer needs all of a parameter's gradient.

Ranges of a bucket are cut between parameters then. Each bucket's parameters are dealt out, the largest first, each to
the rank that lacks most of its part of all buckets so far: what one bucket gives a rank too much, the next ones give
it less. No rank's sum is off its part by more than the largest parameter; a rank may own nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


def deal_whole(buckets: Sequence[Sequence[int]], fractions: Sequence[float]) -> list[list[int]]:
    """Returns by bucket and parameter the rank that owns it.

    Args:
        buckets: by bucket and parameter, its bytes.
        fractions: by rank, what it is to own of all of them (positive or zero, any sum); of 0 it gets nothing.
    """
    total = sum(fractions)
    lacks = [0.0] * len(fractions)
    takers = [rank for rank, fraction in enumerate(fractions) if fraction > 0]
    found = []
    for sizes in buckets:
        lacks = [n + sum(sizes) * fraction / total for n, fraction in zip(lacks, fractions, strict=True)]
        owners = [takers[0]] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            owner = owners[index] = max(takers, key=lambda rank: (lacks[rank], -rank))
            lacks[owner] -= sizes[index]
        found.append(owners)
    return found
