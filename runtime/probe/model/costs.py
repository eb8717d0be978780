"""Cost constants of a model's shape: a plain decoder timed by the same calibration that the Trainer uses."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import MeasuredModel
from heteromesh.planner.cost.passes import Costs, LinkModel
from heteromesh.planner.model.method import Method
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.plan import Pass, Step
from heteromesh.runtime.engine.calibrate import LONGEST, Calibration, free_bytes
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.probe.model.decoder import Decoder
from heteromesh.runtime.work.reader import Reader

LONGEST_PASSES = 5.5
"""A calibration takes about as long as so many passes of its longest sequence."""
EFFICIENCY = 0.6
"""Of the matrix rate, reached by a model; only to keep to the time."""
SHORTEST = 256
FEW, MORE = 1, 3
"""Layers of the two smaller models that stand for one that is too large to be timed whole."""
STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Measured costs of a shape."""

    model: MeasuredModel
    costs: Costs
    layers: tuple[int, ...]
    """Layers of the models that were timed: the shape's own, or fewer."""
    tokens: int
    """Of the longest sequence that was timed."""


def measure_model(
    world: World, spec: ModelSpec, tflops: Mapping[str, float], rate: LinkModel | None, seconds: float
) -> ModelCosts:
    """Measures; every rank of the world must call it. tflops: this rank's matrix rates. rate: of exchanges, if known.
    seconds: for a calibration, roughly; the least of the ranks' counts.

    A model that does not fit the memory or the time is timed with fewer layers, twice; everything is linear in
    their number. Raises UserError where even that does not fit.
    """
    dtype = "bf16" if world.device.type == "cuda" else "fp32"
    limits = list(zip(world.gather(tflops[dtype]), world.gather(free_bytes(world)), strict=True))
    seconds = min(world.gather(seconds))
    tokens = _longest(spec, spec.layers, limits, seconds)
    layers: tuple[int, ...] = (spec.layers,)
    if tokens < LONGEST // 4 and spec.layers > MORE:
        layers, tokens = (FEW, MORE), _longest(spec, MORE, limits, seconds)
    if not tokens:
        raise UserError(
            f"model {spec.name} is too large to be timed on these devices, even {layers[-1]} of its layers on "
            f"{SHORTEST} tokens: leave --model out, and plan with the analytic costs"
        )
    measured = [_measure(world, spec, count, tokens, dtype, rate) for count in layers]
    costs = measured[0] if len(measured) == 1 else extrapolate(measured[0], measured[1], FEW, MORE, spec.layers)
    shape = MeasuredModel(
        name=spec.name,
        parameters=spec.parameters(),
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype="bf16" if dtype == "bf16" else "fp32",
    )
    return ModelCosts(model=shape, costs=costs, layers=layers, tokens=tokens)


def _longest(spec: ModelSpec, layers: int, limits: Sequence[tuple[float, float]], seconds: float) -> int:
    """Tokens of the longest sequence to time, so that every rank's time and memory suffice; 0: none does.

    limits: per rank, TFLOP/s and free bytes.
    """
    cut = replace(spec, layers=layers)
    slowest, least = min(t for t, _ in limits) * 1e12 * EFFICIENCY, min(m for _, m in limits)
    tokens = LONGEST
    while tokens >= SHORTEST:
        flops = 3 * (cut.flops_per_token() * tokens + cut.flops_per_token2() * tokens**2)
        # weights and gradients in fp32; activations and logits in fp32
        needed = 8 * cut.parameters() + 2 * cut.activation_bytes_per_token() * tokens
        if LONGEST_PASSES * flops / slowest <= seconds and needed <= 0.6 * least:
            return tokens
        tokens //= 2
    return 0


def _measure(world: World, spec: ModelSpec, layers: int, tokens: int, dtype: str, rate: LinkModel | None) -> Costs:
    torch.manual_seed(0)
    model = Decoder(spec, layers).to(world.device)
    executor = StepExecutor(model, world, autocast=torch.bfloat16 if dtype == "bf16" else None)
    try:
        sample = torch.arange(4096) * 7919 % spec.vocab
        # the length is fitted to the probe's time, which is more than a run's
        costs = Calibration(executor, Reader([sample]).sample_input, tokens, run_seconds=math.inf).measure(rate=rate)
        executor.speeds = costs.speeds
        return replace(costs, seconds_per_step=_step_overhead(executor, costs, sample, tokens // 4))
    finally:
        executor.close()


def _step_overhead(executor: StepExecutor, costs: Costs, sample: torch.Tensor, tokens: int) -> float:
    """Seconds of a step beyond what its slowest pass is predicted to take.

    What of the gradient sum backward does not hide, and what the sum costs the backward that hides it: messages take
    CPU time and memory bandwidth. The median of steps in which every rank has one pass, its tokens in proportion to
    its speed.
    """
    world = executor.world
    if world.size == 1:
        return 0.0
    lengths = [max(2, int(tokens * v)) for v in costs.speeds]
    passes = tuple(
        Pass(ranks=(r,), method="local", sequences=(r,), shards=((n,),), seconds=0.0) for r, n in enumerate(lengths)
    )
    step = Step(passes=passes, seconds=0.0, bound_seconds=0.0, gap=0.0, solve_seconds=0.0, batch=tuple(lengths))
    reader = Reader([sample[torch.arange(n) % len(sample)] for n in lengths])
    inputs = reader.step_inputs(step, range(len(lengths)), world.rank)
    predicted = max(costs.pass_seconds((r,), "local", [n], [[n]]) for r, n in enumerate(lengths))
    times: list[float] = []
    for _ in range(STEPS):
        world.barrier()
        start = time.perf_counter()
        executor.run(step, inputs, valid_tokens=sum(lengths))
        times.append(max(world.gather(time.perf_counter() - start)))
    return max(0.0, statistics.median(times[1:]) - predicted)


def extrapolate(few: Costs, more: Costs, at_few: int, at_more: int, layers: int) -> Costs:
    """Costs of a model of `layers` layers from those of two smaller ones: seconds and bytes are linear in them."""

    def line(low: float, high: float) -> float:
        return max(0.0, low + (high - low) * (layers - at_few) / (at_more - at_few))

    names = ("token2", "token", "pass", "split_pass", "step")
    seconds = {
        f"seconds_per_{n}": line(getattr(few, f"seconds_per_{n}"), getattr(more, f"seconds_per_{n}")) for n in names
    }
    capacity = tuple(
        max(1, int(1 / max(1 / a, line(1 / a, 1 / b)))) for a, b in zip(few.capacity, more.capacity, strict=True)
    )
    methods = tuple(_with_layers(m, layers / at_more) for m in more.methods)
    return replace(more, **seconds, capacity=capacity, methods=methods)  # type: ignore[arg-type]


def _with_layers(method: Method, factor: float) -> Method:
    return replace(
        method,
        bytes_per_token=method.bytes_per_token * factor,
        carried_bytes_per_token=method.carried_bytes_per_token * factor,
        home_bytes_per_token=method.home_bytes_per_token * factor,
        calls=round(method.calls * factor),
    )
