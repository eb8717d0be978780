"""Measures what passes cost on the devices at hand, all ranks at once, and fits the cost model to it.

The constants of planner/cost/passes.py: a, b, c and speeds from passes of one rank, each as long as its rank is fast;
the exchange's rate and latency from messages, and the compute of the methods that matter here from passes that are
split over all ranks. Nothing of the model changes: gradients are dropped, no optimizer runs, buffers are put back.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.comm.world import World
from heteromesh.parallel.attention.api import PassContext, prepare_pass
from heteromesh.parallel.attention.linear import LinearAttention
from heteromesh.parallel.attention.scoring import Scoring
from heteromesh.parallel.model.undisturbed import undisturbed
from heteromesh.planner.cluster.links import Links
from heteromesh.planner.cost.fit import fit_jointly
from heteromesh.planner.cost.passes import Costs, LinkModel, Method, RateByDegree
from heteromesh.planner.cost.shards import make_pass
from heteromesh.planner.model.attention import AttentionShape, ModelAttention, split_methods
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.plan import Pass
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.network.measure import measure_links
from heteromesh.runtime.process.memory import available_bytes
from heteromesh.runtime.work.reader import PassInput

REPEATS = 3
SLOW_SECONDS = 0.5
LONGEST, SHORTEST = 6144, 64
"""Tokens of measuring passes: longer ones follow from the fit, and would take long."""
TELLING = 1024
"""Tokens of a sequence from which on a pass tells what attention costs."""
INEFFICIENCY = 16.0
"""Times as long as by its operations attention may take, beside what weights compute; with experts not all compute."""
RUN_SECONDS = 3.0
RATE_BYTES = (1 << 20, 16 << 20)
HOST_BYTES = 64 << 20
ROUNDS = 8
"""Of messages, timed together."""
SPLIT_SECONDS = 4.0
"""Once methods have been measured for this long no further one is."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class ObservedAttention:
    """What the model asks of attention in one pass, and what autograd keeps of it."""

    calls: int
    heads: int
    kv_heads: int
    dim: int
    itemsize: int
    saved_bytes_per_token: float
    alike: bool = True
    """Whether all calls are of this shape, and none of linear attention."""
    causal: bool = True
    local: tuple[tuple[Mask, int], ...] = ()
    """(mask, calls) of those that see only part of the keys before a query."""

    def attention(self, forwards: int) -> ModelAttention:
        """Returns the shape as the planner has it. forwards: 2 where layers are recomputed in the backward, else 1."""
        layer = AttentionShape(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim, itemsize=self.itemsize)
        return ModelAttention(calls=self.calls, shape=layer, forwards=forwards, causal=self.causal, local=self.local)

    def methods(self, forwards: int, hosts: Sequence[int] = (0,)) -> tuple[Method, ...]:
        """Returns the ways to split this model's sequences. hosts: of every rank."""
        return split_methods(self.attention(forwards), hosts, self.saved_bytes_per_token)


class _LinearSpy(LinearAttention):
    seen = False

    def __call__(self, *args: Any) -> torch.Tensor:
        self.seen = True
        return super().__call__(*args)


Sample = Callable[[Pass, Sequence[int], int], PassInput]
"""Returns the input of any pass, of the data's own kind, on a rank; given the lengths of its sequences."""


class Calibration:
    """Runs measuring passes of a model. Every rank of the world must make the same calls."""

    def __init__(
        self, executor: StepExecutor, sample: Sample, max_length: int, *, run_seconds: float = RUN_SECONDS
    ) -> None:
        """sample: of the data (`Reader.sample_input`). max_length: of the data's sequences.

        run_seconds: a slow device's longest measuring pass is as short as takes no longer than that.
        """
        self._executor, self._world, self._sample = executor, executor.world, sample
        self._longest, self._run_seconds = max(2, min(LONGEST, max_length)), run_seconds
        self._shape: tuple[ObservedAttention | None] | None = None
        """Once it has been looked at."""

    def measure(self, tokens_per_device: int | None = None, rate: LinkModel | None = None) -> Costs:
        """Returns the fitted costs, equal on every rank. rate: of exchanges, where it is known (`Costs.rate`)."""
        try:
            with undisturbed(self._executor.model):
                return self._measure(tokens_per_device, rate)
        finally:
            for parameter in self._executor.model.parameters():
                parameter.grad = None  # as much memory as the weights

    def _measure(self, tokens_per_device: int | None, rate: LinkModel | None) -> Costs:
        shape = self.attention_shape()
        own = self._affordable()
        short = min(SHORTEST, own)
        packs = [(own,), (-(-own // 2),), (short,) * max(1, own // short // 2), (short,)]
        rows = np.array([[sum(s * s for s in p), sum(p), 1.0] for p in packs])
        everyone = self._world.gather((rows, [self._local_seconds(pack) for pack in packs]))
        measured = [rows for rows, _ in everyone]
        fit, speeds = fit_jointly(measured, [seconds for _, seconds in everyone], self._most_pairs(shape, measured))
        a, b, c = fit.tolist()
        if not a and not b:  # too small a model to tell tokens from passes: an upper bound will do
            b = min(seconds[0] / rows[0][1] for rows, seconds in everyone)
        hosts, forwards = _hosts(self._world), self._executor.forwards
        costs = Costs(
            seconds_per_token2=a,
            seconds_per_token=b,
            seconds_per_pass=c,
            speeds=speeds,
            capacity=self._capacity(shape, tokens_per_device),
            methods=shape.methods(forwards, hosts) if shape else (),
            rate=RateByDegree({}),
            hosts=hosts,
            attention=shape.attention(forwards) if shape and shape.alike else None,
            offload_seconds=self._offload_seconds(shape),
            offload_share=max(0.0, 1 - 2 / shape.calls) if shape else 0.0,
        )
        return self._with_exchanges(costs, rate) if self._world.size > 1 else costs

    def _most_pairs(self, shape: ObservedAttention | None, rows: Sequence[np.ndarray[Any, Any]]) -> float:
        """Returns how much a pair of tokens can cost at the most, in tokens' own seconds; inf where passes show it.

        What attention computes for a pair is 2 heads dim operations a call (half of a causal square), what weights
        compute for a token twice their number; short passes can't tell the one from the other.
        """
        if shape is None or max(float(r[:, 0].max()) for r in rows) >= TELLING**2:
            return math.inf
        weights = sum(p.numel() for p in self._executor.model.parameters())
        return INEFFICIENCY * shape.calls * shape.heads * shape.dim / max(1, weights)

    def _affordable(self) -> int:
        """Tokens of a pass that takes this rank at most `run_seconds`, however it grows with its length."""
        length, found = min(SHORTEST, self._longest), 0
        while not min(self._world.gather(found)):
            seconds = self._once(self._act(self._alone([length]), [length]))
            reach = length * math.sqrt(self._run_seconds / max(1e-9, seconds))
            if reach >= self._longest:
                found = self._longest
            elif reach < 2 * length:
                found = max(length, int(reach))
            else:
                length *= 2
        return found

    def _with_exchanges(self, costs: Costs, rate: LinkModel | None) -> Costs:
        """Adds rate, latency and the compute of the methods that matter here, from passes over all ranks."""
        costs = replace(costs, rate=rate or self._rates(costs.hosts))
        costs = replace(costs, seconds_per_round=self.round_seconds())
        works: dict[str, float] = {}
        rest, began = 0.0, time.perf_counter()
        for method in self._candidates(costs):
            length = self._bearable(method, costs)
            works[method.name] = self._split_work(method, costs, length)
            if len(works) == 1:
                first = replace(costs, methods=(replace(method, work=works[method.name]),))
                rest = self._beyond(first, self._together(method, max(self._world.size, length // 8), costs))
            if max(self._world.gather(time.perf_counter() - began)) > SPLIT_SECONDS:
                break
        usual = statistics.median(works.values()) if works else 1.0
        methods = tuple(replace(m, work=works.get(m.name, usual)) for m in costs.methods)
        return replace(costs, methods=methods, seconds_per_split_pass=max(0.0, rest))

    def _candidates(self, costs: Costs) -> list[Method]:
        """Returns the methods that may be the fastest here, at a few lengths: measuring all would take long."""
        ranks = range(self._world.size)
        found = [costs.method_for(ranks, float(n)) for n in (self._longest, 8 * self._longest, self._longest // 8 + 1)]
        return list({m.name: m for m in found if m is not None}.values())

    def _bearable(self, method: Method, costs: Costs) -> int:
        """Tokens of the longest sequence that takes all ranks together half as long as their own passes may take."""
        low, high = self._world.size, max(self._world.size, self._longest)
        while low < high:
            middle = (low + high + 1) // 2
            bearable = self._together(method, middle, costs).seconds <= self._run_seconds / 2
            low, high = (middle, high) if bearable else (low, middle - 1)
        return low

    def _together(self, method: Method, length: int, costs: Costs) -> Pass:
        """Splits a sequence over all ranks as the planner does, to each as much as it is fast, whatever it can hold."""
        roomy = replace(costs, capacity=(sys.maxsize,) * self._world.size)
        return make_pass(range(self._world.size), method.name, [0], [length], roomy)

    def _split_work(self, method: Method, costs: Costs, length: int) -> float:
        """Returns a split sequence's compute over all ranks, relative to what the constants have its slowest do."""
        plan = self._together(method, length, costs)
        compute = costs.pass_breakdown(plan.ranks, plan.method, [length], plan.shards).compute
        # parts of a sequence hardly compute faster than the whole: one noisy pass must not promise that they do
        return min(1.25, max(0.95, 1 + self._beyond(costs, plan) / max(1e-9, compute)))

    def _beyond(self, costs: Costs, plan: Pass) -> float:
        """Seconds that a pass of one sequence takes beyond what the constants have it take."""
        lengths = [sum(shard for (shard,) in plan.shards)]
        measured: float = max(self._world.gather(self._seconds(plan, lengths, costs.speeds)))
        return measured - costs.pass_seconds(plan.ranks, plan.method, lengths, plan.shards)

    def round_seconds(self) -> float:
        """Measures the latency of a round of messages."""
        exchange = Exchange(self._world, range(self._world.size))
        sends = [torch.zeros(1, device=self._world.device) for _ in exchange.ranks]
        receives = [torch.empty_like(t) for t in sends]

        def act() -> None:
            for _ in range(ROUNDS):
                exchange.all_to_all(sends, receives, "measure the latency")

        slowest: float = max(self._world.gather(self._timed(act)))
        return slowest / ROUNDS

    def _offload_seconds(self, shape: ObservedAttention | None) -> tuple[float, ...]:
        """Measures per rank a token's activations to pinned host memory or back; empty where no device has its own."""
        device, seconds = self._world.device, 0.0
        if device.type == "cuda" and shape is not None:
            there = torch.zeros(HOST_BYTES, dtype=torch.uint8, device=device)
            here = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
            slower = max(self._timed(partial(here.copy_, there)), self._timed(partial(there.copy_, here)))
            seconds = slower * shape.saved_bytes_per_token / HOST_BYTES
        everyone = tuple(self._world.gather(seconds))
        return everyone if any(everyone) else ()

    def _rates(self, hosts: Sequence[int]) -> RateByDegree | Links:
        """Measures exchanges: of several hosts each one's cards, at most what they come to when all exchange."""
        ranks, everyone = range(self._world.size), self.exchange_rate()
        if len(set(hosts)) == 1:
            return RateByDegree({self._world.size: everyone})
        links = measure_links(self._world, hosts)
        shared = min(1.0, everyone / links(ranks))
        cards = tuple(rate * shared for rate in links.ethernet)
        return replace(links, fabric_nics=cards, ethernet=cards)

    def exchange_rate(self) -> float:
        """Bytes per second each way of a rank that exchanges with all others at once."""
        exchange = Exchange(self._world, range(self._world.size))
        times = []
        for size in RATE_BYTES:
            buffers = [torch.zeros(size // self._world.size, dtype=torch.uint8, device=self._world.device)]
            sends, receives = buffers * self._world.size, [torch.empty_like(buffers[0]) for _ in exchange.ranks]
            act = partial(exchange.all_to_all, sends, receives, "measure the rate")
            times.append(max(self._world.gather(self._timed(act))))
        sent = (RATE_BYTES[1] - RATE_BYTES[0]) * (self._world.size - 1) / self._world.size
        return float(sent / max(1e-9, times[1] - times[0]))

    def attention_shape(self) -> ObservedAttention | None:
        """Returns what one small pass shows of attention; None when the model never calls it. The pass runs once."""
        if self._shape is None:
            with undisturbed(self._executor.model):
                self._shape = (self._look_at_attention(),)
        return self._shape[0]

    def _look_at_attention(self) -> ObservedAttention | None:
        tokens = min(self._longest, 512)
        plain, given = self._prepared(self._alone([tokens]), [tokens])
        linear = _LinearSpy(plain.layout, 0, None, None)
        seen: list[tuple[torch.Size, torch.Size, int, bool]] = []
        masks: list[Mask] = []

        def spy(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: torch.Tensor | None
        ) -> torch.Tensor:
            if torch.is_grad_enabled() or not seen:
                seen.append((q.shape, k.shape, q.element_size(), scoring.mask.causal))
                masks.append(scoring.mask)
            return plain.attend(q, k, v, scoring, sinks)

        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            self._executor.forward_backward(PassContext(plain.layout, 0, spy, linear), given, 1)
        if not seen:
            return None
        parameters = {p.untyped_storage().data_ptr() for p in self._executor.model.parameters()}
        saved = sum(size for pointer, size in kept.items() if pointer not in parameters)
        q, k, itemsize, causal = seen[0]
        forwards = self._executor.forwards
        calls, alike = len(seen) // forwards, len(set(seen)) == 1 and not linear.seen
        local = Counter(m for m in masks if m != Mask(causal=m.causal))
        kinds = tuple((mask, count // forwards) for mask, count in local.items())
        return ObservedAttention(calls, q[1], k[1], q[3], itemsize, saved / tokens, alike, causal, kinds)

    def _local_seconds(self, lengths: Sequence[int]) -> float:
        return self._seconds(self._alone(lengths), lengths)

    def _alone(self, lengths: Sequence[int]) -> Pass:
        everything = tuple(range(len(lengths)))
        shards = (tuple(lengths),)
        return Pass(ranks=(self._world.rank,), method="local", sequences=everything, shards=shards, seconds=0.0)

    def _seconds(self, plan: Pass, lengths: Sequence[int], speeds: Sequence[float] = ()) -> float:
        """Measures a pass that starts on every rank at once. speeds: of all ranks, where it is split."""
        return self._timed(self._act(plan, lengths, speeds))

    def _act(self, plan: Pass, lengths: Sequence[int], speeds: Sequence[float] = ()) -> Callable[[], object]:
        if self._world.rank not in plan.ranks:  # too slow for a token
            return lambda: None
        context, batch = self._prepared(plan, lengths, speeds)
        return lambda: self._executor.forward_backward(context, batch, max(1, batch.valid))

    def _timed(self, act: Callable[[], object]) -> float:
        """Seconds of a run that starts on every rank at once: the median of a few after one to warm up.

        Not the least: a step waits for ranks as they are on average. A run that takes long is repeated less.
        """
        slow = max(self._world.gather(self._once(act))) > SLOW_SECONDS
        return statistics.median(self._once(act) for _ in range(REPEATS - slow))

    def _once(self, act: Callable[[], object]) -> float:
        self._world.barrier()
        start = time.perf_counter()
        act()
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return time.perf_counter() - start

    def _prepared(
        self, plan: Pass, lengths: Sequence[int], speeds: Sequence[float] = ()
    ) -> tuple[PassContext, PassInput]:
        given = self._sample(plan, lengths, self._world.rank)
        return prepare_pass(*given.divided(plan, lengths), self._world, speeds or (1.0,) * self._world.size), given

    def _capacity(self, shape: ObservedAttention | None, given: int | None) -> tuple[int, ...]:
        if given is not None:
            return (given,) * self._world.size
        per_token = max(1.0, shape.saved_bytes_per_token if shape else 1.0)
        # half of what is free: the other half is for gradients, optimizer state and what fragments
        return tuple(self._world.gather(max(1, int(0.5 * free_bytes(self._world) / per_token))))


def free_bytes(world: World) -> float:
    """Returns the bytes that this rank may count on: of its device, or its share of the host's."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(world.device)[0])
    return _free_host_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_host_bytes() -> float:
    """Returns what the kernel could give (page cache counts as free), at most what is left of a container's limit."""
    free, (limit, used) = available_bytes(), (CGROUP / "memory.max", CGROUP / "memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return max(0.0, free)


def _hosts(world: World) -> tuple[int, ...]:
    names = world.gather(os.environ.get("GROUP_RANK", "0"))
    order = list(dict.fromkeys(names))
    return tuple(order.index(name) for name in names)
