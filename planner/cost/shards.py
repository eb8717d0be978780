"""How a pass deals its tokens to its ranks: whole tokens, proportional to speed, within every rank's memory."""

from __future__ import annotations

from collections.abc import Sequence

from heteromesh.planner.cost.passes import LOCAL, Costs, load_of
from heteromesh.planner.model.method import Method
from heteromesh.planner.plan import Pass


def shares(tokens: float, speeds: Sequence[float], capacity: Sequence[float]) -> list[float]:
    """Returns tokens per rank: proportional to speed; what exceeds a rank's room goes to the others in the same
    proportion.

    The sum is `tokens`, which must not exceed the sum of `room`.
    """
    power = sum(speeds)
    dealt = [tokens * v / power for v in speeds]
    full: set[int] = set()
    while True:
        over = {i for i, n in enumerate(dealt) if i not in full and n > capacity[i]}
        if not over:
            return dealt
        full |= over
        left = tokens - sum(capacity[i] for i in full)
        power = sum(v for i, v in enumerate(speeds) if i not in full)
        dealt = [capacity[i] if i in full else left * v / power for i, v in enumerate(speeds)]


def deal(lengths: Sequence[int], speeds: Sequence[float], capacity: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Returns shards[i][j]: whole tokens of sequence j on the i-th rank.

    Every column sums to its sequence, every row to the rank's rounded share, and no row exceeds the rank's room. The
    caller makes sure that all tokens fit the room of all ranks.
    """
    left = sum(lengths)
    assert left <= sum(capacity), f"{left} tokens dealt to ranks with room for {sum(capacity)}"
    rest = _rounded(shares(left, speeds, capacity), left)
    columns: list[list[int]] = []
    for length in lengths:
        # rest holds what each rank still takes: a share of it in proportion keeps every later column feasible.
        column = _rounded([length * n / left for n in rest], length)
        rest = [n - m for n, m in zip(rest, column, strict=True)]
        left -= length
        columns.append(column)
    return tuple(zip(*columns, strict=True))


def make_pass(ranks: Sequence[int], method: str, sequences: Sequence[int], batch: Sequence[int], costs: Costs) -> Pass:
    """Returns a pass over these sequences of the batch, its shards dealt by `deal`, its seconds exact.

    Ranks that get no token (more ranks than tokens, or a rank too slow for one) are left out, and so are ranks that
    the method can't use then.
    """
    members = tuple(sorted(ranks))
    lengths = [batch[k] for k in sequences]
    if method == LOCAL:
        shards: tuple[tuple[int, ...], ...] = (tuple(lengths),)
    else:
        capacity = costs.capacity_for(members, costs.method(method), sum(lengths))
        members, shards = without_idle(members, deal(lengths, [costs.speeds[r] for r in members], capacity))
        chosen = costs.method(method)
        if chosen and len(members) > 1 and not chosen.fits(len(members)):
            return make_pass(members[:-1], method, sequences, batch, costs)
        method = method if len(members) > 1 else LOCAL
    return costed(members, costs.method(method), tuple(sequences), shards, lengths, costs)


def costed(
    ranks: tuple[int, ...],
    method: Method | None,
    sequences: tuple[int, ...],
    shards: tuple[tuple[int, ...], ...],
    lengths: Sequence[int],
    costs: Costs,
) -> Pass:
    """Returns the pass with its seconds, and what of its activations has to go to host memory; method: None on one
    rank.
    """
    load = load_of(lengths, shards)
    offload = costs.offload_ratio(ranks, method, load.tokens)
    return Pass(
        ranks=ranks,
        method=method.name if method else LOCAL,
        sequences=sequences,
        shards=shards,
        seconds=costs.priced(ranks, method, load, offload).seconds,
        offload=offload,
    )


def fastest_pass(p: Pass, batch: Sequence[int], costs: Costs) -> Pass:
    """Returns the same ranks and shards with the method that is fastest for them."""
    lengths = [batch[k] for k in p.sequences]
    if len(p.ranks) == 1 or len(costs.methods) < 2:
        return p
    best = costs.best_method(p.ranks, lengths, p.shards)
    if best is None or best.name == p.method:
        return p
    other = costed(p.ranks, best, p.sequences, p.shards, lengths, costs)
    return other if other.seconds < p.seconds else p


def without_idle(
    ranks: Sequence[int], shards: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Returns (ranks, shards) of those that hold a token: a rank with nothing to compute would only wait."""
    busy = [(rank, row) for rank, row in zip(ranks, shards, strict=True) if sum(row)]
    return tuple(rank for rank, _ in busy), tuple(row for _, row in busy)


def _rounded(parts: Sequence[float], total: int) -> list[int]:
    """Returns whole numbers that sum to `total`, each its part rounded down or up (largest remainders; ties to the
    lower).
    """
    # A part that is whole but for a float's last bit counts as whole: rounded up it could exceed a rank's room.
    floors = [int(p + 1e-6) for p in parts]
    missing = total - sum(floors)
    for i in sorted(range(len(parts)), key=lambda i: (floors[i] - parts[i], i))[:missing]:
        floors[i] += 1
    return floors
