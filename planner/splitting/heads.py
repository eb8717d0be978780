"""How Ulysses deals the heads of attention to ranks, with grouped key heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.planner.model.method import split_heads


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one rank: query heads first..last, and the key heads first_key..last_key that they use."""

    first: int
    last: int
    first_key: int
    last_key: int
    aligned: bool
    """Whether every key head has equally many query heads here; else keys are repeated, one for each query head."""

    @property
    def queries(self) -> int:
        """Query heads."""
        return self.last - self.first

    @property
    def keys(self) -> int:
        """Key heads that are sent to the rank."""
        return self.last_key - self.first_key

    @property
    def keys_at_work(self) -> int:
        """Key heads that the rank's attention runs with."""
        return self.keys if self.aligned else self.queries


def head_shares(heads: int, kv_heads: int, speeds: Sequence[float]) -> tuple[HeadShare, ...]:
    """Returns one share a rank, proportional to speed. Raises ValueError when there are more ranks than query heads."""
    group, first, shares = heads // kv_heads, 0, []
    for count in split_heads(heads, speeds):
        last = first + count
        aligned = last <= (first // group + 1) * group or (not first % group and not last % group)
        shares.append(HeadShare(first, last, first // group, -(-last // group), aligned))
        first = last
    return tuple(shares)
