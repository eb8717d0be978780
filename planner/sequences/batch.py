"""The lengths of one step's sequences, checked against what the cluster can hold."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from heteromesh.errors import UserError
from heteromesh.planner.cost.passes import Costs


def validate_lengths(lengths: Sequence[int], costs: Costs) -> tuple[int, ...]:
    """Returns the batch as plain ints; raises UserError naming the index and value of what can't be planned."""
    batch = validate_batch(lengths)
    most, ranks = largest(costs)
    k = max(range(len(batch)), key=lambda i: batch[i])
    if batch[k] > most:
        where = "the one rank" if costs.ranks == 1 else f"the best {ranks} of {costs.ranks} ranks"
        raise UserError(
            f"sequence {k} has {batch[k]} tokens but at most {most} fit on {where}: "
            "raise device memory (tokens_per_device) or the number of devices, or lower max_length"
        )
    return batch


def validate_batch(lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns the batch as plain ints, whoever is to hold it; raises UserError as `validate_lengths`."""
    if not len(lengths):
        raise UserError("the batch is empty: give at least one sequence length")
    for k, length in enumerate(lengths):
        if not isinstance(length, Integral) or isinstance(length, bool) or int(length) <= 0:
            raise UserError(f"sequence {k} has length {length!r}: a length is a whole number of tokens, at least 1")
    return tuple(int(n) for n in lengths)


def largest(costs: Costs) -> tuple[int, int]:
    """Returns (tokens of the longest sequence that fits some set of ranks, ranks of that set)."""
    order = sorted(range(costs.ranks), key=lambda r: (-costs.capacity[r], r))
    best = (costs.capacity[order[0]], 1)
    for degree in range(2, costs.ranks + 1):
        held = min((m.held for m in costs.methods if m.fits(degree)), default=None)
        if held is not None:
            capacity = sum(costs.capacity[r] for r in order[:degree])
            # a method that holds others' keys rounds every rank's room down
            capacity = int(capacity / (1 + held * (degree - 1))) - degree if held else capacity
            best = max(best, (capacity, degree), key=lambda b: b[0])
    return best
