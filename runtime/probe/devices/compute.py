"""How fast a rank's device multiplies matrices and copies memory, all ranks at work at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heteromesh.comm.world import World

TRIALS = 3
SECONDS = 0.5
"""Of a trial: several periods of a CPU quota (0.1 s each), or it would not show."""
FIRST_SECONDS = 0.12
"""Of the run that says how many a trial takes: more than such a period, or it would run ahead of the quota."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Sustained rates of one rank."""

    tflops: dict[str, float]
    """TFLOP/s of matrix products by dtype: `bf16`, `fp32`."""
    memory_gbps: float
    """GB/s read plus written by a copy."""
    busy_cores: float
    """CPU cores that this rank really had while it multiplied: a quota or other programs show here."""

    @property
    def best_tflops(self) -> float:
        """Returns the rate of the faster dtype."""
        return max(self.tflops.values())


def measure_compute(world: World) -> Compute:
    """This rank's rates; every rank of the world must call it."""
    cuda = world.device.type == "cuda"
    side = 8192 if cuda else 512
    tflops, busy = {}, []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=world.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds, cores = sustained(world, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
        tflops[name] = 2 * side**3 / seconds / 1e12
        busy.append(cores)
        del a, b, out
    # larger than any cache
    source = torch.zeros((1 << 30) if cuda else (1 << 26), dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    seconds, _ = sustained(world, lambda: target.copy_(source))
    return Compute(tflops=tflops, memory_gbps=2 * source.numel() / seconds / 1e9, busy_cores=max(busy))


def sustained(world: World, act: Callable[[], object]) -> tuple[float, float]:
    """Times (seconds of one `act` in a row, CPU cores used): medians of trials that begin on all ranks together."""
    _timed(world, act, 1)
    count = 1
    while (seconds := _timed(world, act, count)[0]) < FIRST_SECONDS:
        count *= 2
    trials = []
    for _ in range(TRIALS):
        world.barrier()
        count = max(1, round(SECONDS / seconds * count))
        seconds, cores = _timed(world, act, count)
        trials.append((seconds / count, cores))
    return statistics.median(t for t, _ in trials), statistics.median(c for _, c in trials)


def _timed(world: World, act: Callable[[], object], count: int) -> tuple[float, float]:
    world.synchronise()
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        act()
    world.synchronise()
    seconds = max(1e-9, time.perf_counter() - start)
    return seconds, (time.process_time() - used) / seconds
