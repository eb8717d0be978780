"""When a step ends: what of its weight gathers and gradient sums its passes hide. The one formula for both.

Gathers take G seconds of the busiest link and hide under forward, gradient sums take R seconds and hide under backward,
each in `chunks` equal parts (layers), a part at a time. Two things of a and b seconds that follow each other part by
part take

    pair(a, b) = max(a, b) + min(a, b) / chunks

*Pass-major* (the Trainer's replicated weights): gradients leave during a rank's last backward, B of its last pass's
seconds; weights updated by other owners arrive during its first forward, F of its first pass's:

    seconds = max over ranks of  end - F - B + pair(F, G) + pair(B, R)

with F, B and end 0 for a rank without passes. *Layer-major* (sharded weights): all passes go through a layer between
two of its transfers, so with C = the latest end

    seconds = pair(forward_share * C, G) + pair((1 - forward_share) * C, R)

which is also the least that any list of passes that ends at C can take (`at_least`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heteromesh.planner.plan import Pass

FORWARD = 1 / 3
"""Of a pass's compute; the rest is backward."""
RECOMPUTED_FORWARD = 1 / 4
"""The same where backward repeats the forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTraffic:
    """Transfers of a step that its passes hide in part."""

    gather_seconds: float = 0.0
    """Of weights, under forward."""
    reduce_seconds: float = 0.0
    """Of gradients, and of weights gathered once more, under backward."""
    chunks: int = 1
    """Parts that they travel in."""
    forward_share: float = FORWARD
    layer_major: bool = False

    @property
    def nothing(self) -> bool:
        return not self.gather_seconds and not self.reduce_seconds

    def at_least(self, seconds: float) -> float:
        """Returns what a step takes, at least, whose passes end after so many seconds."""
        forward = self.forward_share * seconds
        return self._pair(forward, self.gather_seconds) + self._pair(seconds - forward, self.reduce_seconds)

    def step_seconds(self, passes: Iterable[Pass], ends: Sequence[float]) -> float:
        """Returns when the last gradient is summed; passes: in order, ends: per rank, when its last one ends."""
        if self.nothing or self.layer_major:
            return self.at_least(max(ends)) if self.layer_major else max(ends)
        first, last = [0.0] * len(ends), [0.0] * len(ends)
        seen: set[int] = set()
        for p in passes:
            for rank in p.ranks:
                last[rank] = p.seconds
                if rank not in seen:
                    seen.add(rank)
                    first[rank] = p.seconds
        return max(self._rank_seconds(*times) for times in zip(first, last, ends, strict=True))

    def _rank_seconds(self, first: float, last: float, end: float) -> float:
        forward, backward = self.forward_share * first, (1 - self.forward_share) * last
        rest = end - forward - backward
        return rest + self._pair(forward, self.gather_seconds) + self._pair(backward, self.reduce_seconds)

    def _pair(self, a: float, b: float) -> float:
        return max(a, b) + min(a, b) / self.chunks
