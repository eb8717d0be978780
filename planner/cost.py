"""What a pass costs: seconds, tokens of memory, bytes. The one definition that planner and checks share.

    seconds(pass) = max over its ranks r of ( w * (a * sum_j s_j * n_rj * f_r + b * n_r) / v_r + B(d) * n_r / rate )
                    + c  (+ c_split where d > 1)

s_j: length of sequence j; n_rj: its tokens on rank r (n_r summed over j); v_r: speed of r relative to the
reference device; d: number of ranks; B(d): bytes the method moves per token of a shard. With equal speeds and
even shards this is FlexSP's (a*s*s + b*s)/d + communication + beta (arXiv 2412.01523, equations 11-14).
w: the method's compute relative to that on whole sequences (1 where d = 1, and unless measured).
f_r corrects methods that split attention by heads: (heads of r / heads) / (n_r / sum n); 1 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Scaling = Literal["constant", "fraction", "peers"]
LOCAL = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How many bytes a way of splitting sequences moves.

    `scaling` says how bytes per token of a shard grow with the degree d: `constant` (a cost file's number),
    `fraction` ((d-1)/d: all-to-all) or `peers` (d-1: all-gather).
    """

    name: str
    bytes_per_token: float
    scaling: Scaling = "constant"
    heads: int = 0
    """Query heads that are dealt to ranks, at most one rank each; 0 where the method does not split heads."""
    work: float = 1.0
    """Compute of a split pass relative to the same on whole sequences: smaller pieces may fit caches better."""

    def bytes_at(self, degree: int) -> float:
        """Bytes one rank sends per token of its shard, forward and backward, at this degree."""
        factor = {"constant": 1.0, "fraction": (degree - 1) / degree, "peers": degree - 1.0}[self.scaling]
        return self.bytes_per_token * factor if degree > 1 else 0.0

    def fits(self, degree: int) -> bool:
        """Whether the method can split over this many ranks."""
        return not self.heads or degree <= self.heads


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A cost model bound to a cluster: everything `plan_step` asks about passes."""

    seconds_per_token2: float
    """a: attention, at the reference speed."""
    seconds_per_token: float
    """b: all else that grows with tokens."""
    seconds_per_pass: float
    """c: fixed cost of a pass."""
    seconds_per_split_pass: float = 0.0
    """Further fixed cost of a pass of several ranks (latency of its exchanges)."""
    seconds_per_step: float = 0.0
    """Fixed cost of a step: what of the gradient sum is exposed, and the optimizer."""
    speeds: tuple[float, ...]
    """Per rank, relative to the reference device that the seconds above are for."""
    capacity: tuple[int, ...]
    """Per rank, tokens of activations that fit."""
    methods: tuple[Method, ...]
    rate: Callable[[Sequence[int]], float] = field(compare=False)
    """Bytes per second each way that the slowest member of a set of ranks has for exchanges inside the set."""
    hosts: tuple[int, ...]
    """Per rank, the host it is on."""

    @property
    def ranks(self) -> int:
        return len(self.speeds)

    def method_for(self, ranks: Sequence[int], length: float = math.inf) -> Method | None:
        """The fastest method for a split sequence of this length; None where no method fits the degree."""
        choices = [m for m in self.methods if m.fits(len(ranks))]
        size = 1e6 if math.isinf(length) else length
        return min(choices, key=lambda m: self._fluid(ranks, m, size, size * size), default=None)

    def pass_seconds(
        self, ranks: Sequence[int], method: str, lengths: Sequence[int], shards: Sequence[Sequence[int]]
    ) -> float:
        """Seconds of a pass with exactly these shards (shards[i][j]: tokens of sequence j on ranks[i])."""
        degree, total = len(ranks), sum(lengths)
        fixed = self.seconds_per_pass + (self.seconds_per_split_pass if degree > 1 else 0.0)
        if not total:
            return fixed
        chosen = self._method(method)
        wire = chosen.bytes_at(degree) / self.rate(ranks) if chosen and degree > 1 else 0.0
        heads = split_heads(chosen.heads, [self.speeds[r] for r in ranks]) if chosen and chosen.heads else None
        squares = sum(s * s for s in lengths)
        worst = 0.0
        for i, rank in enumerate(ranks):
            tokens = sum(shards[i])
            if heads and chosen:
                pairs = squares * heads[i] / chosen.heads
            else:
                pairs = float(sum(s * n for s, n in zip(lengths, shards[i], strict=True)))
            work = self.seconds_per_token2 * pairs + self.seconds_per_token * tokens
            worst = max(worst, work * (chosen.work if chosen else 1.0) / self.speeds[rank] + wire * tokens)
        return worst + fixed

    def _method(self, name: str) -> Method | None:
        return next((m for m in self.methods if m.name == name), None)

    def _fluid(self, ranks: Sequence[int], method: Method, tokens: float, squares: float) -> float:
        """Seconds with shards exactly proportional to speed, without fixed costs."""
        speeds = [self.speeds[r] for r in ranks]
        power, degree = sum(speeds), len(ranks)
        uneven = 1.0
        if method.heads:
            heads = split_heads(method.heads, speeds)
            uneven = max(h / method.heads * power / v for h, v in zip(heads, speeds, strict=True))
        compute = (self.seconds_per_token2 * squares * uneven + self.seconds_per_token * tokens) / power
        wire = method.bytes_at(degree) * tokens * max(speeds) / power / self.rate(ranks)
        return compute * method.work + wire


def split_heads(heads: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Heads per rank, proportional to speed, at least one each (largest remainders; ties to the lower rank).

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


@dataclass(frozen=True)
class RateByDegree:
    """A cost file's `[bytes_per_second]`: a missing degree takes the next larger one's rate (beyond all: the last)."""

    table: Mapping[int, float]

    def __call__(self, ranks: Sequence[int]) -> float:
        if not self.table:
            return math.inf
        degree = min((d for d in self.table if d >= len(ranks)), default=max(self.table))
        return self.table[degree]
