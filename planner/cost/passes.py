"""What a pass costs: seconds, tokens of memory, bytes. The one definition that planner and checks share.

    seconds(pass) = max over its ranks r of ( C_r + exposed_r ) + c  (+ c_split + tiles where d > 1)
    C_r       = L_r + A_r = w * (b * n_r + a * sum_j s_j * n_rj * f_r) / v_r
    exposed_r = E * n_r + latency + max(0, T * max n - h * A_r)

s_j: length of sequence j; n_rj: its tokens on rank r (n_r summed over j); v_r: speed of r relative to the reference
device; d: number of ranks. E: seconds of exchange per token that nothing hides, T: those that hide under the share h
of the rank's attention A_r (planner/model/method.py has the bytes of both, planner/cluster/links.py their rates). With
equal speeds, even shards and nothing hidden this is FlexSP's (a*s*s + b*s)/d + communication + beta (arXiv 2412.01523,
equations 11-14). w: the method's compute relative to that on whole sequences (1 where d = 1, and unless measured). f_r
corrects methods that split attention by heads: (heads of r / heads) / (n_r / n of the ranks that share them); and
rings, which wait in every round for the rank with the largest block: d * max n / sum n; 1 elsewhere.

A pass may keep a share of its activations in host memory (`offload`). Moving them takes m_r seconds each way, the way
out hidden under forward, the way back under backward: C_r becomes max(C_r / 3, m_r) + max(2 * C_r / 3, m_r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from typing import NamedTuple, Protocol

from heteromesh.planner.cost.overlap import FORWARD as FORWARD
from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.model.attention import ModelAttention
from heteromesh.planner.model.method import Method as Method
from heteromesh.planner.model.method import Scaling as Scaling
from heteromesh.planner.model.method import split_heads as split_heads

LOCAL = "local"


class LinkModel(Protocol):
    """How fast sets of ranks exchange."""

    @property
    def by_degree(self) -> bool:
        """Whether nothing but the number of ranks matters."""

    def __call__(self, ranks: Sequence[int]) -> float:
        """Returns bytes per second each way of the slowest member when everyone exchanges with everyone."""

    def around(self, ranks: Sequence[int], inner: int) -> float:
        """Returns the same when every rank sends to the one `inner` places before it."""

    def gathering(self, ranks: Sequence[int], shares: Sequence[float]) -> float:
        """Returns seconds a byte of the whole, which the ranks hold in these shares, until every rank has all of it."""

    def host_key(self, host: int) -> object:
        """Returns what hosts have in common that are interchangeable in exchanges."""


class CommCost(NamedTuple):
    """Seconds that a method's transfers take on a set of ranks."""

    exposed: float
    """Per token of a rank's shard."""
    hidden: float
    """Per token of the largest shard."""
    exposed_latency: float
    hidden_latency: float
    hides: float
    """Share of a rank's attention that the hidden ones may hide under."""


class CostBreakdown(NamedTuple):
    """What the seconds of a pass consist of: their sum is the pass."""

    compute: float
    exchange: float
    """Transfers that nothing hides."""
    latency: float
    """Rounds of messages that nothing hides."""
    offload: float
    """Moving activations to host memory and back, beyond what compute hides."""
    fixed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange + self.latency + self.offload + self.fixed


class Load(NamedTuple):
    """Who computes what in a pass."""

    tokens: Sequence[float]
    """Per rank."""
    pairs: Sequence[float]
    """Per rank, sum over sequences of length times own tokens."""
    sequences: int


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
    """Further fixed cost of a pass of several ranks."""
    seconds_per_round: float = 0.0
    """Latency of a round of messages."""
    seconds_per_tile: float = 0.0
    """The time of a further kernel call, where a method cuts attention into tiles."""
    seconds_per_step: float = 0.0
    """Fixed cost of a step: the optimizer, and what is exposed of transfers that `traffic` doesn't have."""
    traffic: StepTraffic = field(default_factory=StepTraffic)
    """Gathers of weights and sums of gradients, of which passes hide a part."""
    speeds: tuple[float, ...]
    """Per rank, relative to the reference device that the seconds above are for."""
    capacity: tuple[int, ...]
    """Per rank, tokens of activations that fit."""
    methods: tuple[Method, ...]
    rate: LinkModel = field(compare=False)
    """Bytes per second each way that the slowest member of a set of ranks has for exchanges inside the set."""
    hosts: tuple[int, ...]
    """Per rank, the host it is on."""
    attention: ModelAttention | None = None
    """The model's, where it is known: then a plan says how many bytes every rank of a pass sends."""
    offload_seconds: tuple[float, ...] = ()
    """Per rank, to move a token's activations to host memory (or back); 0: its memory is the host's. Empty: all."""
    resident: tuple[int, ...] = ()
    """Per rank, tokens that fit without offloading, where `capacity` is what fits with it (`offloading`)."""
    offload_share: float = 0.0
    """The part of a token's activations that can be moved: the first and the last layer's are wanted back at once."""
    step_capacity: tuple[int, ...] = ()
    """Per rank, tokens of all its passes of a step that fit, where something of each token is held through the step
    (layer-major order: the layers' inputs). Empty: no limit."""

    @property
    def ranks(self) -> int:
        return len(self.speeds)

    def method_for(self, ranks: Sequence[int], length: float = math.inf) -> Method | None:
        """Returns the fastest method for a split sequence of this length that fits; None where no method fits the
        degree.
        """
        speeds = [self.speeds[r] for r in ranks]
        power, size = sum(speeds), 1e6 if math.isinf(length) else length
        load = Load([size * v / power for v in speeds], [size * size * v / power for v in speeds], 1)
        return self._fastest(ranks, load, limited=not math.isinf(length))

    def best_method(
        self, ranks: Sequence[int], lengths: Sequence[int], shards: Sequence[Sequence[int]]
    ) -> Method | None:
        """Returns the fastest method for exactly these shards; None where none fits."""
        return self._fastest(ranks, load_of(lengths, shards))

    def pass_seconds(
        self,
        ranks: Sequence[int],
        method: str,
        lengths: Sequence[int],
        shards: Sequence[Sequence[int]],
        offload: float = 0.0,
    ) -> float:
        """Returns seconds of a pass with exactly these shards (shards[i][j]: tokens of sequence j on ranks[i])."""
        return self.pass_breakdown(ranks, method, lengths, shards, offload).seconds

    def pass_breakdown(
        self,
        ranks: Sequence[int],
        method: str,
        lengths: Sequence[int],
        shards: Sequence[Sequence[int]],
        offload: float = 0.0,
    ) -> CostBreakdown:
        """Returns what `pass_seconds` sums, in parts."""
        return self.priced(ranks, self.method(method), load_of(lengths, shards), offload)

    def priced(self, ranks: Sequence[int], method: Method | None, load: Load, offload: float = 0.0) -> CostBreakdown:
        """Returns the parts of a pass; method: None on one rank."""
        degree = len(ranks)
        fixed = self.seconds_per_pass + (self.seconds_per_split_pass if degree > 1 else 0.0)
        if not sum(load.tokens):
            return CostBreakdown(0.0, 0.0, 0.0, 0.0, fixed)
        comm_cost = CommCost(0.0, 0.0, 0.0, 0.0, 0.0)
        if method is not None and degree > 1:
            comm_cost = self.comm_cost(ranks, method, load.tokens)
            fixed += method.extra_tiles(degree) * load.sequences * self.seconds_per_tile
        hidden = comm_cost.hidden * max(load.tokens) + comm_cost.hidden_latency
        if method is not None and method.border_tokens:
            hidden += method.over_borders(degree, max(load.tokens), load.sequences) / self._border_rate(ranks, method)
        compute = total = moved = 0.0
        for i, (rank, (attention, rest)) in enumerate(zip(ranks, self.computing(ranks, method, load), strict=True)):
            own = attention + rest
            extra = self.offload_wait(rank, load.tokens[i], own, offload) if offload else 0.0
            waits = comm_cost.exposed * load.tokens[i] + max(0.0, hidden - comm_cost.hides * attention)
            compute, total, moved = max(compute, own), max(total, own + waits + extra), max(moved, own + extra)
        moved -= compute
        exchange = max(0.0, total - compute - moved)
        # of what hides in part, the latency counts in proportion
        late = min(exchange, comm_cost.hidden_latency / hidden * exchange) if hidden else 0.0
        return CostBreakdown(compute, exchange - late, late + comm_cost.exposed_latency, moved, fixed)

    def computing(self, ranks: Sequence[int], method: Method | None, load: Load) -> list[tuple[float, float]]:
        """Returns (seconds of attention, of all else that grows with tokens) of each rank; method: None on one rank."""
        speeds, pairs, work = [self.speeds[r] for r in ranks], load.pairs, 1.0
        if method is not None and len(ranks) > 1:
            pairs, work = dealt_pairs(method, load, speeds), method.work
        a, b = self.seconds_per_token2 * work, self.seconds_per_token * work
        return [(a * p / v, b * n / v) for p, n, v in zip(pairs, load.tokens, speeds, strict=True)]

    def comm_cost(self, ranks: Sequence[int], method: Method, tokens: Sequence[float]) -> CommCost:
        """Returns seconds of the method's transfers among these ranks. tokens: of their shards, or in proportion to
        these.
        """
        degree, rate = len(ranks), self.rate(ranks)
        if method.scaling == "peers":
            whole = sum(tokens)
            seconds = self.rate.gathering(ranks, [n / whole for n in tokens]) * whole / max(tokens)
            once = method.bytes_per_token * seconds
        else:
            once = method.exchanged(degree) / self._inner_rate(ranks, method)
        messages = [n * self.seconds_per_round for n in method.messages(degree)]
        hides = method.hidden_share(degree)
        if method.overlap != "rounds":
            split = (once, 0.0) if method.overlap == "nothing" else (0.0, once)
            return CommCost(*split, messages[0], messages[1], hides)
        around = self.rate.around(ranks, max(1, method.inner))
        # in groups the owner of a block is as far as the ring goes: at the same place of another group
        back, last = method.return_bytes(degree), method.exposed_return_share(degree)
        back /= around if method.inner else rate
        hidden = method.hop_bytes(degree) / around + back * (1 - last)
        return CommCost(once + back * last, hidden, messages[0], messages[1], hides)

    def capacity_for(self, ranks: Sequence[int], method: Method | None, tokens: int) -> list[int]:
        """Returns tokens that each rank can hold in a pass of so many tokens: some methods hold others' keys too."""
        held = method.held if method else 0.0
        if not held:
            return [self.capacity[r] for r in ranks]
        return [max(0, math.floor((self.capacity[r] - held * tokens) / (1 - held) + 1e-6)) for r in ranks]

    def memory(self, method: Method | None, tokens: Sequence[float]) -> list[float]:
        """Returns what each rank of a pass holds, in tokens of activations. tokens: of the ranks' shards."""
        held, total = method.held if method else 0.0, sum(tokens)
        return [n + held * (total - n) for n in tokens]

    def offload_ratio(self, ranks: Sequence[int], method: Method | None, tokens: Sequence[float]) -> float:
        """Returns the smallest ratio of activations whose offloading makes these shards fit; 0: they fit anyway."""
        if not self.resident:
            return 0.0
        over = (
            (m - self.resident[r]) / (m * self.offload_share)
            for r, m in zip(ranks, self.memory(method, tokens), strict=True)
            if m > self.resident[r]
        )
        return min(1.0, max(over, default=0.0))

    def method(self, name: str) -> Method | None:
        """Returns the method of this name, if there is one."""
        return next((m for m in self.methods if m.name == name), None)

    def offloading(self) -> Costs | None:
        """Returns these costs with the memory that offloading all it can gives; None where no device has memory of its
        own.
        """
        if not self.offload_seconds or not self.offload_share:
            return None
        more = 1 / (1 - self.offload_share)
        room = zip(self.capacity, self.offload_seconds, strict=True)
        return replace(self, capacity=tuple(int(n * more) if s else n for n, s in room), resident=self.capacity)

    def offload_wait(self, rank: int, tokens: float, compute: float, ratio: float) -> float:
        """Returns seconds that moving this ratio of the rank's activations adds to its compute."""
        one_way = ratio * tokens * self.offload_seconds[rank] if self.offload_seconds else 0.0
        return max(compute * FORWARD, one_way) + max(compute * (1 - FORWARD), one_way) - compute

    def _fastest(self, ranks: Sequence[int], load: Load, limited: bool = True) -> Method | None:
        """Returns the fastest method; limited: that fits, else the one that takes least memory."""
        choices = [m for m in self.methods if m.fits(len(ranks))]
        if len(choices) < 2:
            return choices[0] if choices else None
        if limited:
            least = min(m.held for m in choices)
            choices = [m for m in choices if m.held == least or self._holds(ranks, m, load.tokens)]
        return min(choices, key=lambda m: self.priced(ranks, m, load).seconds)

    def _holds(self, ranks: Sequence[int], method: Method, tokens: Sequence[float]) -> bool:
        return all(m <= self.capacity[r] for r, m in zip(ranks, self.memory(method, tokens), strict=True))

    def _border_rate(self, ranks: Sequence[int], method: Method) -> float:
        """Returns bytes per second of what goes over borders between shards."""
        return self.rate.around(ranks, max(1, method.inner)) if method.overlap == "rounds" else self.rate(ranks)

    def _inner_rate(self, ranks: Sequence[int], method: Method) -> float:
        """Returns the slowest group's rate, where only groups of neighbours exchange."""
        if not method.inner:
            return self.rate(ranks)
        return min(self.rate(ranks[i : i + method.inner]) for i in range(0, len(ranks), method.inner))


def load_of(lengths: Sequence[int], shards: Sequence[Sequence[int]]) -> Load:
    """Returns shards[i][j]: tokens of sequence j on the i-th rank."""
    return Load(
        [sum(row) for row in shards],
        [float(sum(map(mul, lengths, row))) for row in shards],
        len(lengths),
    )


def dealt_pairs(method: Method, load: Load, speeds: Sequence[float]) -> Sequence[float]:
    """Returns pairs of query and key that each rank works on under this method; in a ring those of every round's
    slowest.
    """
    degree, pairs = len(speeds), load.pairs
    size = method.dealt(degree)
    if size > 1:
        places = [sum(speeds[p::size]) for p in range(size)]
        heads = split_heads(method.heads, places)
        sums = [sum(pairs[g : g + size]) for g in range(0, degree, size)]
        pairs = [sums[i // size] * heads[i % size] / method.heads for i in range(degree)]
    if method.overlap != "rounds":
        return pairs
    blocks = [sum(load.tokens[g : g + size]) for g in range(0, degree, size)]
    wait = len(blocks) * max(blocks) / sum(blocks)
    return [p * wait for p in pairs]


@dataclass(frozen=True)
class RateByDegree:
    """A cost file's `[bytes_per_second]`: a missing degree takes the next larger one's rate (beyond all: the last)."""

    table: Mapping[int, float]

    def __call__(self, ranks: Sequence[int]) -> float:
        if not self.table:
            return math.inf
        degree = min((d for d in self.table if d >= len(ranks)), default=max(self.table))
        return self.table[degree]

    @property
    def by_degree(self) -> bool:
        """Whether nothing but the number of ranks matters: so it is in a table."""
        return True

    def around(self, ranks: Sequence[int], inner: int) -> float:
        """Returns the rate of any exchange: the table has no other."""
        return self(ranks)

    def gathering(self, ranks: Sequence[int], shares: Sequence[float]) -> float:
        """Returns seconds a byte of the whole: the largest share goes to every other rank."""
        return max(shares) * (len(ranks) - 1) / self(ranks)

    def host_key(self, host: int) -> object:
        """Returns the same for all hosts."""
        return None
