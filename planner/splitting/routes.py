"""How blocks of keys (or of queries) travel among the members of a pass: who sends which tokens to whom, in rounds.

A ring moves every member's block hop by hop past all others (Ring Attention, arXiv 2310.01889). Trimmed, a hop carries
only what its receiver or a member after it needs: with zigzag shards and blocks that travel towards lower members,
a causal ring of keys drops its tails at the wrap and moves 3/4 of the bytes. The bidirectional ring sends each block
half-way round each way. Members without tokens are not part of the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from heteromesh.planner.model.mask import CAUSAL, Mask
from heteromesh.planner.splitting.layout import Layout, Segment
from heteromesh.planner.splitting.masked import masked, sees

Kind = Literal["ring", "trimmed_ring", "bidirectional_ring", "token_ring", "direct"]
RINGS: tuple[Kind, ...] = ("ring", "trimmed_ring", "bidirectional_ring")
"""Those in which keys go round."""
Moving = Literal["keys", "queries"]


@dataclass(frozen=True, slots=True)
class RingMessage:
    """Tokens of `origin`'s block that `source` hands to `target`, and what of them `target` uses itself."""

    origin: int
    source: int
    target: int
    segments: tuple[Segment, ...]
    used: tuple[Segment, ...]
    """What it uses of `segments`, in their order. Partial results that go back to the origin are for these."""


@dataclass(frozen=True)
class Schedule:
    """rounds[t]: the messages of round t. What arrives in a round is used, and passed on, in the next."""

    rounds: tuple[tuple[RingMessage, ...], ...]

    def of(self, member: int) -> Schedule:
        """Returns the messages that concern one member: as source, target or origin."""
        mine = tuple(tuple(m for m in r if member in (m.source, m.target, m.origin)) for r in self.rounds)
        return Schedule(mine)


def schedule(layout: Layout, kind: Kind, mask: Mask = CAUSAL) -> Schedule:
    """Returns the messages of one attention over this layout. Their segments are those of `masked(layout, mask)`.

    `direct`: one round in which every member sends its keys straight to every member that needs them.
    """
    layout, mask = masked(layout, mask)
    ring = [i for i in range(len(layout.segments)) if layout.segments[i]]
    moving: Moving = "queries" if kind == "token_ring" else "keys"
    reach = [_Reach(layout.segments[i], moving, mask) for i in range(len(layout.segments))]
    rounds: list[list[RingMessage]] = []
    for place in range(len(ring)):
        for path in _paths(ring, place, kind):
            for step, message in enumerate(_along(path, layout, reach, trim=kind != "ring")):
                while len(rounds) <= step:
                    rounds.append([])
                if message.segments:
                    rounds[step].append(message)
    return Schedule(tuple(map(tuple, rounds)))


class _Reach:
    """Which segments of others a member needs to see."""

    def __init__(self, own: Sequence[Segment], moving: Moving, mask: Mask) -> None:
        self._keys, self._mask = moving == "keys", mask
        self._own: dict[int, list[Segment]] = {}
        for s in own:
            self._own.setdefault(s.sequence, []).append(s)

    def sees(self, other: Segment) -> bool:
        """Returns whether own queries see these keys (or these queries see own keys)."""
        own = self._own.get(other.sequence, ())
        if self._keys:
            return any(sees(s, other, self._mask) for s in own)
        return any(sees(other, s, self._mask) for s in own)


def _paths(ring: Sequence[int], place: int, kind: Kind) -> list[list[int]]:
    """Returns the members that the block of ring[place] visits, itself first, one list a stream."""
    size = len(ring)
    forward = [ring[(place + i) % size] for i in range(size)]
    backward = [ring[(place - i) % size] for i in range(size)]
    if kind == "ring":
        return [forward]
    if kind == "bidirectional_ring":
        half = size // 2
        # blocks lose their tails only on the way to lower members: the longer half goes there
        return [backward[: half + 1], forward[: size - half]]
    if kind == "direct":
        return [[ring[place], other] for other in ring if other != ring[place]]
    return [backward]


def _along(path: Sequence[int], layout: Layout, reach: Sequence[_Reach], trim: bool) -> list[RingMessage]:
    origin = path[0]
    block = layout.segments[origin]
    messages = []
    for step in range(1, len(path)):
        if trim:
            later = [reach[i] for i in path[step:]]
            carried = tuple(s for s in block if any(r.sees(s) for r in later))
            used = tuple(s for s in carried if reach[path[step]].sees(s))
        else:
            carried = used = block
        messages.append(RingMessage(origin, path[step - 1], path[step], carried, used))
    return messages
