"""The static even layouts that a plan is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence

from heteromesh.planner.batch import checked
from heteromesh.planner.bound import bound_seconds
from heteromesh.planner.cost import LOCAL, Costs
from heteromesh.planner.errors import UserError
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.shards import without_idle
from heteromesh.planner.timeline import in_order, step_seconds


def static_sequence_parallel(lengths: Sequence[int], costs: Costs) -> Step:
    """Every pass has all ranks; sequences packed best-fit (longest first) into passes; even shards.

    Even shards fill the smallest memory first: a pass holds `ranks * min(capacity)` tokens. Raises UserError for
    bad lengths, for a sequence that is longer than that, and where no method splits over all ranks.
    """
    began = time.perf_counter()
    batch = checked(lengths, costs)
    return _step(sequence_parallel_passes(batch, costs), batch, costs, began)


def static_data_parallel(lengths: Sequence[int], costs: Costs) -> Step:
    """Sequence k goes to rank k mod ranks (arrival order); each rank packs its own best-fit under its memory.

    Raises UserError for bad lengths and for a sequence that does not fit the rank it is dealt to.
    """
    began = time.perf_counter()
    batch = checked(lengths, costs)
    return _step(data_parallel_passes(batch, costs), batch, costs, began)


def sequence_parallel_passes(batch: Sequence[int], costs: Costs) -> list[Pass]:
    """The passes of `static_sequence_parallel`; a rank without a token is left out of its pass."""
    if costs.ranks == 1:
        return data_parallel_passes(batch, costs)
    team = tuple(range(costs.ranks))
    room = costs.ranks * min(costs.capacity)
    if max(batch) > room:
        k = max(range(len(batch)), key=lambda i: batch[i])
        raise UserError(
            f"sequence {k} has {batch[k]} tokens but even shards hold at most {room} on {costs.ranks} ranks: "
            "raise device memory (tokens_per_device) or lower max_length"
        )
    passes = []
    for sequences in _best_fit(range(len(batch)), batch, room):
        own = [batch[k] for k in sequences]
        method = costs.method_for(team, max(own))
        if method is None:
            raise UserError(f"no method splits a sequence over {costs.ranks} ranks: use fewer ranks or another method")
        ranks, shards = without_idle(team, even_shards(own, costs.ranks))
        name = method.name if len(ranks) > 1 else LOCAL
        seconds = costs.pass_seconds(ranks, name, own, shards)
        passes.append(Pass(ranks=ranks, method=name, sequences=tuple(sequences), shards=shards, seconds=seconds))
    return passes


def data_parallel_passes(batch: Sequence[int], costs: Costs) -> list[Pass]:
    """The passes of `static_data_parallel`."""
    passes = []
    for rank in range(costs.ranks):
        own = range(rank, len(batch), costs.ranks)
        for k in own:
            if batch[k] > costs.capacity[rank]:
                raise UserError(
                    f"sequence {k} has {batch[k]} tokens but rank {rank} holds at most {costs.capacity[rank]}: "
                    "raise device memory (tokens_per_device), lower max_length, or let the planner split it"
                )
        for sequences in _best_fit(own, batch, costs.capacity[rank]):
            local = tuple(batch[k] for k in sequences)
            seconds = costs.pass_seconds((rank,), LOCAL, local, (local,))
            passes.append(
                Pass(ranks=(rank,), method=LOCAL, sequences=tuple(sequences), shards=(local,), seconds=seconds)
            )
    return passes


def even_shards(lengths: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """shards[i][j] that differ by at most one token per sequence and per rank's total."""
    columns, turn = [], 0
    for length in lengths:
        base, extra = divmod(length, ranks)
        # The odd tokens go on where the last sequence's stopped, so that totals stay even too.
        late = {(turn + i) % ranks for i in range(extra)}
        columns.append([base + (i in late) for i in range(ranks)])
        turn = (turn + extra) % ranks
    return tuple(zip(*columns, strict=True))


def _best_fit(sequences: Sequence[int], batch: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    left: list[int] = []
    for k in sorted(sequences, key=lambda k: (-batch[k], k)):
        fitting = [i for i, n in enumerate(left) if n >= batch[k]]
        if fitting:
            i = min(fitting, key=lambda i: left[i])
        else:
            i = len(bins)
            bins.append([])
            left.append(room)
        bins[i].append(k)
        left[i] -= batch[k]
    return bins


def _step(passes: Sequence[Pass], batch: tuple[int, ...], costs: Costs, began: float) -> Step:
    seconds, bound = step_seconds(passes, costs), bound_seconds(batch, costs)
    return Step(
        passes=in_order(passes, costs.ranks),
        seconds=seconds,
        bound_seconds=bound,
        gap=seconds / bound - 1 if bound else 0.0,
        solve_seconds=time.perf_counter() - began,
        batch=batch,
    )
