"""How a pass deals its tokens to its ranks: whole tokens, proportional to speed, within every rank's memory."""

from __future__ import annotations

from collections.abc import Sequence

from heteromesh.planner.cost import LOCAL, Costs
from heteromesh.planner.plan import Pass


def shares(tokens: float, speeds: Sequence[float], room: Sequence[float]) -> list[float]:
    """Tokens per rank: proportional to speed; what exceeds a rank's room goes to the others in the same proportion.

    The sum is `tokens`, which must not exceed the sum of `room`.
    """
    power = sum(speeds)
    dealt = [tokens * v / power for v in speeds]
    full: set[int] = set()
    while True:
        over = {i for i, n in enumerate(dealt) if i not in full and n > room[i]}
        if not over:
            return dealt
        full |= over
        left = tokens - sum(room[i] for i in full)
        power = sum(v for i, v in enumerate(speeds) if i not in full)
        dealt = [room[i] if i in full else left * v / power for i, v in enumerate(speeds)]


def deal(lengths: Sequence[int], speeds: Sequence[float], room: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """shards[i][j]: whole tokens of sequence j on the i-th rank.

    Every column sums to its sequence, every row to the rank's rounded share, and no row exceeds the rank's room. The
    caller makes sure that all tokens fit the room of all ranks.
    """
    left = sum(lengths)
    assert left <= sum(room), f"{left} tokens dealt to ranks with room for {sum(room)}"
    rest = _rounded(shares(left, speeds, room), left)
    columns: list[list[int]] = []
    for length in lengths:
        # rest holds what each rank still takes: a share of it in proportion keeps every later column feasible.
        column = _rounded([length * n / left for n in rest], length)
        rest = [n - m for n, m in zip(rest, column, strict=True)]
        left -= length
        columns.append(column)
    return tuple(zip(*columns, strict=True))


def make_pass(ranks: Sequence[int], method: str, sequences: Sequence[int], batch: Sequence[int], costs: Costs) -> Pass:
    """A pass over these sequences of the batch, its shards dealt by `deal`, its seconds exact.

    Ranks that would get no token (more ranks than tokens, or a rank too slow for one) are left out.
    """
    team = tuple(sorted(ranks))
    lengths = [batch[k] for k in sequences]
    if method == LOCAL:
        shards: tuple[tuple[int, ...], ...] = (tuple(lengths),)
    else:
        shards = deal(lengths, [costs.speeds[r] for r in team], [costs.capacity[r] for r in team])
        team, shards = without_idle(team, shards)
        method = method if len(team) > 1 else LOCAL
    seconds = costs.pass_seconds(team, method, lengths, shards)
    return Pass(ranks=team, method=method, sequences=tuple(sequences), shards=shards, seconds=seconds)


def without_idle(
    ranks: Sequence[int], shards: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(ranks, shards) of those that hold a token: a rank with nothing to compute would only wait."""
    busy = [(rank, row) for rank, row in zip(ranks, shards, strict=True) if sum(row)]
    return tuple(rank for rank, _ in busy), tuple(row for _, row in busy)


def _rounded(parts: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each its part rounded down or up (largest remainders; ties to the lower)."""
    # A part that is whole but for a float's last bit counts as whole: rounded up it could exceed a rank's room.
    floors = [int(p + 1e-6) for p in parts]
    missing = total - sum(floors)
    for i in sorted(range(len(parts)), key=lambda i: (floors[i] - parts[i], i))[:missing]:
        floors[i] += 1
    return floors
