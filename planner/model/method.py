"""What a way to split sequences moves and waits for, as a few numbers that are linear in tokens.

A method has up to three flows, each in bytes per token of a rank's shard, forward and backward together:

- exchanged: with every other rank at once (`bytes_per_token` times its `scaling`), e.g. Ulysses' all-to-all or the keys
  that `gather` collects;
- carried: from neighbour to neighbour, once a hop (`carried_bytes_per_token`), e.g. a ring's keys;
- home: partial results, straight to their owner (`home_bytes_per_token`, once a hop).

Layers whose queries see a window only need the keys just before a border between two shards, however long the shards
are (`border_bytes`). Only gather and the trimmed rings use that; the other methods move every layer's tokens.

planner.traffic has the exact bytes of a pass; tests/planner/splitting/test_methods.py holds these formulas against it.
Seconds follow the slowest rank, whose blocks are not trimmed: with zigzag shards some rank passes on whole blocks in
every round, so that a trimmed ring saves a quarter of the bytes and, between equal links, no time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["constant", "fraction", "peers"]
Overlap = Literal["nothing", "own", "rounds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way of splitting sequences over the ranks of a pass."""

    name: str
    bytes_per_token: float
    """Exchanged with all others at once."""
    scaling: Scaling = "constant"
    """How the above grows with the degree d: `constant` (a cost file's number), `fraction` ((d-1)/d: all-to-all) or
    `peers` (d-1: all-gather)."""
    heads: int = 0
    """Query heads that are dealt to ranks, at most one rank each; 0 where the method does not split heads."""
    work: float = 1.0
    """Compute of a split pass relative to the same on whole sequences: smaller pieces may fit caches better."""
    kv_heads: int = 0
    """Key heads, where heads are dealt: with more ranks than these a key head goes to several. 0: one a query head."""
    inner: int = 0
    """Over how many neighbours heads are dealt, where that is not all: those groups then form a ring."""
    carried_bytes_per_token: float = 0.0
    """A hop of a ring."""
    home_bytes_per_token: float = 0.0
    """Partial results for a hop's block."""
    share: float = 1.0
    """The part of the blocks that causal attention makes the average rank move; the slowest moves them whole."""
    both_ways: bool = False
    """Half of the blocks go round each way: half the rounds."""
    overlap: Overlap = "nothing"
    """What a transfer hides under: nothing, attention to the rank's own block (`own`), or all but the last block
    (`rounds`)."""
    held: float = 0.0
    """Memory that a token of the other ranks takes until backward, relative to a token of the own shard."""
    calls: int = 0
    """Attention layers; 0: rounds and tiles cost nothing of their own."""
    forwards: int = 1
    """2 where layers are recomputed in the backward."""
    homeward: int = 0
    """Phases (forwards, backward) in which partial results go home."""
    border_bytes: float = 0.0
    """Of layers with windows, what goes over one border between shards, forward and backward."""
    border_tokens: float = 0.0
    """Tokens behind these: shards that are shorter send less."""

    def fits(self, degree: int) -> bool:
        """Returns whether the method can split over this many ranks."""
        if self.inner and (degree % self.inner or degree == self.inner):
            return False
        return not self.heads or (self.inner or degree) <= self.heads

    def dealt(self, degree: int) -> int:
        """Neighbours that share a group's heads; 1: none."""
        return (self.inner or degree) if self.heads else 1

    def hops(self, degree: int) -> int:
        """Hops that a block goes round, 0 without a ring."""
        return degree // max(1, self.inner) - 1 if self.overlap == "rounds" else 0

    def exchanged(self, degree: int) -> float:
        """Returns bytes that a rank exchanges with all others at once, per token of its shard."""
        size = self.inner or degree
        if degree <= 1:
            return 0.0
        if self.scaling == "constant":
            return self.bytes_per_token
        if self.scaling == "peers":
            return self.bytes_per_token * (size - 1)
        # key heads that several ranks use are sent to each of them
        more = (self.heads + max(self.kv_heads, size)) / (self.heads + self.kv_heads) if self.kv_heads else 1.0
        return self.bytes_per_token * (size - 1) / size * more

    def hop_bytes(self, degree: int) -> float:
        """Returns bytes that the slowest rank passes on to its neighbour, per token of the largest shard."""
        return self.carried_bytes_per_token * self.hops(degree) * self._repeated()

    def return_bytes(self, degree: int) -> float:
        """Returns bytes that the slowest rank sends straight home, per token of the largest shard."""
        return self.home_bytes_per_token * self.hops(degree) * self._repeated()

    def over_borders(self, degree: int, tokens: float, sequences: int) -> float:
        """Returns bytes that a rank sends for layers with windows, with so many tokens of so many sequences.

        A zigzag shard has two pieces. On a ring the keys of one of them go nearly all the way round.
        """
        if degree <= 1 or not self.border_tokens or not sequences:
            return 0.0
        hops = self.hops(degree)
        way = (hops + 1) / 2 if hops else 1.0
        if self.both_ways:
            way = 1.0
        sent = 2 * sequences * self.border_bytes * way * self._repeated()
        return sent * min(1.0, tokens / (2 * sequences * self.border_tokens))

    def bytes_at(self, degree: int) -> float:
        """Returns bytes that the average rank sends per token of its shard, forward and backward, with even shards."""
        if degree <= 1:
            return 0.0
        once = self.exchanged(degree) * (self.share if self.scaling == "peers" else 1.0)
        hops, share = self.hops(degree), self.share
        carried = self.hop_bytes(degree) * share
        if self.both_ways:
            # a block on its way to higher members keeps its tail until it has passed the wrap
            up = hops - (hops + 1) // 2
            carried += self.carried_bytes_per_token * up * (up - 1) / (4 * degree)
        return once + carried + self.return_bytes(degree) * share

    def hidden_share(self, degree: int) -> float:
        """Returns the share of a rank's attention under which its transfers hide."""
        if self.overlap == "nothing" or degree <= 1:
            return 0.0
        blocks = self.hops(degree) + 1 if self.overlap == "rounds" else degree
        return (blocks - 1) / blocks if self.overlap == "rounds" else 1 / blocks

    def exposed_return_share(self, degree: int) -> float:
        """Returns the share of the partial results that go home after the last block: nothing is left to hide them."""
        rounds = self._rounds(degree)
        return 1 / rounds if rounds else 0.0

    def messages(self, degree: int) -> tuple[float, float]:
        """Returns (exposed, hidden) rounds of messages in a pass, each of which costs a latency."""
        phases, rounds = self.forwards + 1, self._rounds(degree)
        exposed = 2 * phases if self.heads else 0
        hidden = phases * (rounds + (self.overlap == "own"))
        return self.calls * (exposed + self.homeward), self.calls * hidden

    def extra_tiles(self, degree: int) -> float:
        """Returns kernel calls a sequence beyond those on one rank, forward and backward."""
        own = 2 if self.overlap == "own" else self.hops(degree)
        return float(self.calls * (self.forwards + 1) * own)

    def _rounds(self, degree: int) -> int:
        hops = self.hops(degree)
        return (hops + 1) // 2 if self.both_ways else hops

    def _repeated(self) -> float:
        """Returns keys that travel for one key head, in groups with more ranks than key heads."""
        return max(1.0, self.inner / self.kv_heads) if self.inner and self.kv_heads else 1.0


def split_heads(heads: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Returns heads per rank, proportional to speed, at least one each (largest remainders; ties to the lower rank).

    Raises ValueError when there are more ranks than heads.
    """
    if len(speeds) > heads:
        raise ValueError(f"{heads} heads can't be dealt to {len(speeds)} ranks: at most one rank per head")
    power = sum(speeds)
    shares = [max(1.0, heads * v / power) for v in speeds]
    counts = [int(s) for s in shares]
    while sum(counts) > heads:
        counts[
            max(
                range(len(counts)),
                key=lambda i: (counts[i] - heads * speeds[i] / power, -i) if counts[i] > 1 else (-math.inf, -i),
            )
        ] -= 1
    while sum(counts) < heads:
        counts[max(range(len(counts)), key=lambda i: (heads * speeds[i] / power - counts[i], -i))] += 1
    return tuple(counts)
