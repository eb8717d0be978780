"""Who meets whom: every pair once, nobody twice in a round."""

from __future__ import annotations


def tournament(players: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Rounds of disjoint pairs (a < b) of players 0..n: n-1 rounds, or n where n is odd and one rests in each.

    The circle method: the last player stays, the others move on by one place from round to round.
    """
    seats = players + players % 2
    rounds = []
    for turn in range(seats - 1):
        circle = [(turn + i) % (seats - 1) for i in range(seats - 1)]
        pairs = [(circle[0], seats - 1)]
        pairs += [(circle[i], circle[-i]) for i in range(1, seats // 2)]
        rounds.append(tuple(sorted((min(p), max(p)) for p in pairs if max(p) < players)))
    return tuple(r for r in rounds if r)
