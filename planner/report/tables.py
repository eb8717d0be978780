"""Aligned columns of ASCII, and lists of ranks in few characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby


def rank_list(ranks: Iterable[int]) -> str:
    """Returns ranks with runs shortened: 0-7,16."""
    words = []
    for _, run in groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in run]
        words.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(words)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart; a head that begins with `<` is set left, others right."""
    left = [head.startswith("<") for head in heads]
    lines = [[head.removeprefix("<") for head in heads], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )
