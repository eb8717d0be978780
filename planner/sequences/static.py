"""The static even layouts that a plan is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from heteromesh.errors import UserError
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.cost.shards import costed, without_idle
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.batch import validate_lengths
from heteromesh.planner.sequences.bound import bound_seconds
from heteromesh.planner.sequences.timeline import step_seconds, timed_step


def static_sequence_parallel(lengths: Sequence[int], costs: Costs) -> Step:
    """Splits every pass over all ranks. Raises UserError as `even_passes`."""
    return _step(lengths, costs, lambda batch: even_passes(batch, costs, costs.ranks))


def static_data_parallel(lengths: Sequence[int], costs: Costs) -> Step:
    """Gives every pass one rank. Raises UserError as `even_passes`."""
    return _step(lengths, costs, lambda batch: even_passes(batch, costs, 1))


def static_best_degree(lengths: Sequence[int], costs: Costs) -> Step:
    """Returns the even layout of the degree that is fastest for this batch: what hand-tuning for every step would
    choose.

    Raises UserError where no degree is possible.
    """
    return _step(lengths, costs, lambda batch: best_even_passes(batch, costs))


def best_even_passes(batch: Sequence[int], costs: Costs) -> list[Pass]:
    """Returns the passes of `static_best_degree`."""
    found, reason = [], None
    for degree in (d for d in range(1, costs.ranks + 1) if costs.ranks % d == 0):
        try:
            found.append(even_passes(batch, costs, degree))
        except UserError as error:
            reason = error
    if not found:
        assert reason
        raise reason
    return min(found, key=lambda passes: step_seconds(passes, costs))


def even_passes(batch: Sequence[int], costs: Costs, degree: int) -> list[Pass]:
    """Cuts the ranks into blocks of `degree`, each of them a data-parallel replica.

    Sequence k goes to block k mod blocks (arrival order, as a DistributedSampler deals); a block packs its own
    best-fit, longest first, into passes of even shards, which fill the smallest memory first. A rank without a token
    is left out of its pass. Raises UserError for a sequence that does not fit a block, and where no method splits
    over `degree`.
    """
    passes = []
    blocks = costs.ranks // degree
    for block in range(blocks):
        members = tuple(range(block * degree, (block + 1) * degree))
        own = range(block, len(batch), blocks)
        capacity = _even_capacity(members, costs)
        for k in own:
            if batch[k] > capacity:
                raise UserError(
                    f"sequence {k} has {batch[k]} tokens but even shards on {_ranks(members)} hold at most {capacity}: "
                    "raise device memory (tokens_per_device), lower max_length, or let the planner split it"
                )
        passes += [_even_pass(members, sequences, batch, costs) for sequences in _best_fit(own, batch, capacity)]
    return passes


def _even_pass(members: tuple[int, ...], sequences: Sequence[int], batch: Sequence[int], costs: Costs) -> Pass:
    lengths = [batch[k] for k in sequences]
    ranks, shards = without_idle(members, even_shards(lengths, len(members)))
    method = costs.best_method(ranks, lengths, shards) if len(ranks) > 1 else None
    if method is None and len(ranks) > 1:
        raise UserError(f"no method splits a sequence over {len(ranks)} ranks: use fewer ranks or another method")
    return costed(ranks, method, tuple(sequences), shards, lengths, costs)


def _even_capacity(members: Sequence[int], costs: Costs) -> int:
    """Returns tokens that fit in even shards, with the method that takes least memory."""
    degree, least = len(members), min(costs.capacity[r] for r in members)
    held = min((m.held for m in costs.methods if m.fits(degree)), default=0.0) if degree > 1 else 0.0
    return int(degree * least / (1 + held * (degree - 1)))


def _ranks(members: Sequence[int]) -> str:
    return f"ranks {members[0]} to {members[-1]}" if len(members) > 1 else f"rank {members[0]}"


def even_shards(lengths: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns shards[i][j] that differ by at most one token per sequence and per rank's total."""
    columns, turn = [], 0
    for length in lengths:
        base, extra = divmod(length, ranks)
        # The odd tokens go on where the last sequence's stopped, so that totals stay even too.
        late = {(turn + i) % ranks for i in range(extra)}
        columns.append([base + (i in late) for i in range(ranks)])
        turn = (turn + extra) % ranks
    return tuple(zip(*columns, strict=True))


def _best_fit(sequences: Sequence[int], batch: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs by best-fit decreasing: each sequence into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    left: list[int] = []
    for k in sorted(sequences, key=lambda k: (-batch[k], k)):
        fitting = [i for i, n in enumerate(left) if n >= batch[k]]
        if fitting:
            i = min(fitting, key=lambda i: left[i])
        else:
            i = len(bins)
            bins.append([])
            left.append(capacity)
        bins[i].append(k)
        left[i] -= batch[k]
    return bins


def _step(lengths: Sequence[int], costs: Costs, layout: Callable[[Sequence[int]], list[Pass]]) -> Step:
    began = time.perf_counter()
    batch = validate_lengths(lengths, costs)
    return timed_step(layout(batch), batch, costs, bound_seconds(batch, costs), began)
