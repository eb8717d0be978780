"""Units of work made of several sequences (a pair to be compared), as the sequences that a pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from heteromesh.planner.plan import Pass


def divide(plan: Pass, parts: Sequence[Sequence[int]]) -> tuple[Pass, list[int]]:
    """Returns the pass with each unit's sequences in its place, and their lengths.

    parts[j]: lengths of the sequences that the plan's j-th is made of. Each rank holds as many tokens of a unit as
    before, and about the same share of each of its sequences.
    """
    columns = []
    for j, lengths in enumerate(parts):
        left = [row[j] for row in plan.shards]
        for length in lengths:
            taken = _shared(length, left)
            left = [have - took for have, took in zip(left, taken, strict=True)]
            columns.append(taken)
    sequences = tuple(s for s, lengths in zip(plan.sequences, parts, strict=True) for _ in lengths)
    shards = tuple(tuple(column[i] for column in columns) for i in range(len(plan.ranks)))
    return replace(plan, sequences=sequences, shards=shards), [n for lengths in parts for n in lengths]


def _shared(length: int, room: Sequence[int]) -> list[int]:
    """Splits a length in proportion to room, to no one more than there is."""
    total = max(1, sum(room))
    taken = [length * have // total for have in room]
    # what rounding left, to those whose share was cut most: these have room for one more
    order = sorted(range(len(room)), key=lambda i: -(length * room[i] % total))
    for i in order[: length - sum(taken)]:
        taken[i] += 1
    return taken
