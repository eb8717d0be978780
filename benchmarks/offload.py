"""Optimizer-state offload: the update on the host, the disk tier, schedules on a virtual clock; peers on a GPU.

    python benchmarks/offload.py host [--parameters 100e6] [--threads 2] [--repeats 15] [--clock wall|cpu]
    python benchmarks/offload.py disk --folder DIR [--parameters 100e6]
    python benchmarks/offload.py schedule
    python benchmarks/offload.py clip [--parameters 50e6]
    python benchmarks/offload.py gpu [--parameters 1e9] [--folder DIR]      # beside DeepSpeed, where it is installed

What is compared takes turns, repeat by repeat, so that a busy machine disturbs all alike; told are medians and bests,
as ratios within a repeat. `host`: our one pass against what torch needs three for, in bytes that must move (28 a
parameter) against an in-place scaling of a tensor. `disk`: an optimizer's steps against as many bytes read and
written by threads that do nothing else, as many as are fastest. `clip`: norm, scaling and update one after the other
against the update begun before the norm is known.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heteromesh.parallel.state.offload.host_update import (
    AdamOptions,
    SegmentUpdate,
    State,
    TorchUpdate,
    open_host_update,
)
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW
from heteromesh.parallel.state.offload.state_file import aligned_bytes
from heteromesh.planner.ownership.offload import RING, OffloadPlan, cut_evenly, on_host, plan_offload
from heteromesh.planner.ownership.offload_rates import OffloadMemory, OffloadRates
from heteromesh.planner.ownership.offload_split import published_stride, staged_fraction
from heteromesh.planner.ownership.offload_tasks import play, published_tasks, task_seconds
from heteromesh.planner.ownership.state_tiers import subgroup_numel

OPTIONS = AdamOptions(1e-3, 0.9, 0.999, 1e-8, 0.01, 3)
HOST_BYTES = 28
"""That a parameter's update must move: fp32 p, m, v in and out, bf16 gradient in, bf16 weight out."""


def take_turns(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns the seconds of each call in each repeat, after one that doesn't count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat:
                found[name].append(clock() - start)
    return found


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    each = sorted(a / b for a, b in zip(slow, fast, strict=True))
    quartiles = each[len(each) // 4], each[-1 - len(each) // 4]
    return f"{statistics.median(each):.2f} (quartiles {quartiles[0]:.2f} to {quartiles[1]:.2f})"


def deepspeed_update(numel: int, dtype: torch.dtype) -> tuple[Callable[[], object], str]:
    """Returns a step of DeepSpeed's CPU-Adam, and whether it has torch's bits. Raises ImportError where it isn't."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    start, gradient = torch.randn(4096), torch.randn(4096)
    results = []
    for make in (DeepSpeedCPUAdam, lambda p, **options: torch.optim.AdamW(p, fused=True, **options)):
        parameter = nn.Parameter(start.clone())
        optimizer = make([parameter], lr=1e-3, weight_decay=0.01)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    same = (
        "torch's bits" if torch.equal(*results) else f"not torch's bits ({(results[0] - results[1]).abs().max():.1e})"
    )
    large = nn.Parameter(torch.randn(numel).to(dtype))
    large.grad = torch.randn(numel).to(dtype)
    return DeepSpeedCPUAdam([large], lr=1e-3, weight_decay=0.01).step, same


def host(numel: int, threads: int, repeats: int, clock: str) -> None:
    torch.set_num_threads(threads)
    state: State = (torch.randn(numel), torch.zeros(numel), torch.zeros(numel))
    gradient = torch.randn(numel).to(torch.bfloat16)
    weight, scaled = state[0].to(torch.bfloat16), torch.ones(2 * numel)
    wide = torch.empty(numel)
    update = open_host_update()

    def three_passes() -> None:
        wide.copy_(gradient)
        torch._fused_adamw_(
            [state[0]], [wide], [state[1]], [state[2]], [], [torch.tensor(3.0)], lr=OPTIONS.lr, beta1=OPTIONS.beta1,
            beta2=OPTIONS.beta2, weight_decay=OPTIONS.weight_decay, eps=OPTIONS.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        weight.copy_(state[0])

    calls: dict[str, Callable[[], object]] = {
        "one pass": lambda: update([SegmentUpdate(state, gradient, OPTIONS, 0, numel, weight)], threads),
        "torch, three passes": three_passes,
        "torch, slice by slice (fallback)": lambda: TorchUpdate()(
            [SegmentUpdate(state, gradient, OPTIONS, 0, numel, weight)]
        ),
        "fp32, one pass": lambda: update([SegmentUpdate(state, wide, OPTIONS, 0, numel)], threads),
        "fp32, torch": lambda: TorchUpdate()([SegmentUpdate(state, wide, OPTIONS, 0, numel)]),
        "scale in place": lambda: scaled.mul_(1.0),
    }
    try:
        calls["fp32, DeepSpeed CPU-Adam"], same = deepspeed_update(numel, torch.float32)
        calls["bf16 without masters, DeepSpeed"], _ = deepspeed_update(numel, torch.bfloat16)
    except ImportError:
        same = "not installed"
    found = take_turns(calls, repeats, time.process_time if clock == "cpu" else time.perf_counter)
    print(
        f"host update ({update.name}), {numel / 1e6:.0f} M parameters, {threads} threads, {repeats} repeats, "
        f"{clock} time of the process"
    )
    for name, seconds in found.items():
        moved = 16 if name == "scale in place" else HOST_BYTES
        print(
            f"  {name:34} median {numel / statistics.median(seconds) / 1e6:7.0f} M/s, "
            f"best {numel / min(seconds) / 1e6:7.0f}"
            f" ({moved * numel / min(seconds) / 1e9:.1f} GB/s of {moved} bytes)"
        )
    print("  DeepSpeed CPU-Adam:", same)
    if "fp32, DeepSpeed CPU-Adam" in found:
        print("  fp32: DeepSpeed / one pass", ratio(found["fp32, DeepSpeed CPU-Adam"], found["fp32, one pass"]))
    print("  three passes / one pass", ratio(found["torch, three passes"], found["one pass"]))
    print("  fp32: torch / one pass", ratio(found["fp32, torch"], found["fp32, one pass"]))
    bandwidth = [16 / a / (HOST_BYTES / b) for a, b in zip(found["scale in place"], found["one pass"], strict=True)]
    print(f"  of the in-place bandwidth: {1 / statistics.median(bandwidth):.2f}")


def on_disk(numel: int, subgroup_numel: int, ring: int) -> OffloadPlan:
    cut = cut_evenly(numel, subgroup_numel, "disk")
    return OffloadPlan(subgroups=cut, order=tuple(range(len(cut))), ring=ring)


DISK_ALONE = ((1, 16 << 20), (2, 8 << 20), (4, 4 << 20))
"""Threads that read, as many that write, and bytes of a piece: how the disk's own rate is found, the best of these."""


class DiskAlone:
    """A file of which one half is read and the other written, past the page cache, by threads that do nothing else."""

    def __init__(self, folder: Path, half: int) -> None:
        self._path, self._half = folder / "disk-alone.bin", half
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._file, 0, 2 * half)
        for first in (half, 0):  # what is read must have been written
            self._all([partial(self._go, os.pwritev, first, 8 << 20, 1, 0)])

    def __call__(self, threads: int, piece: int) -> None:
        reads = [partial(self._go, os.preadv, self._half, piece, threads, n) for n in range(threads)]
        self._all([*reads, *(partial(self._go, os.pwritev, 0, piece, threads, n) for n in range(threads))])

    def _go(self, call: Callable[[int, list[memoryview], int], int], first: int, piece: int, of: int, n: int) -> None:
        buffer = memoryview(mmap.mmap(-1, piece))
        for offset in range(n * piece, self._half, of * piece):
            call(self._file, [buffer[: self._half - offset]], first + offset)

    def _all(self, calls: Sequence[Callable[[], None]]) -> None:
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink()


def disk(numel: int, folder: Path, repeats: int) -> None:
    """As many subgroups as the Trainer makes; with the order flipped, a ring of them stays in memory."""
    parameter = nn.Parameter(torch.randn(numel))
    parameter.grad = torch.randn(numel)
    size = subgroup_numel(numel)
    optimizer = OffloadedAdamW([parameter], plan=lambda n: on_disk(n, size, RING), state_folder=folder)
    plan = optimizer.plan
    count = len(plan.subgroups)
    record = aligned_bytes(2 * plan.largest)
    moved = (count - plan.ring) * record
    alone = DiskAlone(folder, moved)
    calls: dict[str, Callable[[], object]] = {"steps": optimizer.step}
    calls |= {f"disk alone, {t} + {t} threads, {p >> 20} MB": partial(alone, t, p) for t, p in DISK_ALONE}
    found = take_turns(calls, repeats)
    file = optimizer._bind()[0].file
    assert file is not None
    print(
        f"disk tier, {numel / 1e6:.0f} M parameters (8 bytes of state each) in {count} subgroups, direct I/O "
        f"{file.direct}, {repeats} repeats"
    )
    for name, seconds in found.items():
        print(
            f"  {name:34} median {2 * moved / statistics.median(seconds) / 1e9:.2f} GB/s, "
            f"best {2 * moved / min(seconds) / 1e9:.2f}"
        )
    fastest = min((name for name in found if name != "steps"), key=lambda name: statistics.median(found[name]))
    print(f"  step: {numel / statistics.median(found['steps']) / 1e6:.0f} M parameters/s")
    print(f"  of the disk's rate ({fastest}):", ratio(found[fastest], found["steps"]))
    optimizer.close()
    alone.close()


def link(update: float, bytes_per_second: float, **others: float) -> OffloadRates:
    return OffloadRates(
        host_update=update, device_update=1e11, to_device=bytes_per_second, to_host=bytes_per_second, **others
    )


CASES = {
    "H100, PCIe 5 (fit of their 20B logs)": link(1.68e9, 50e9),
    "A100, PCIe 4 (fit of their 20B logs)": link(0.887e9, 24e9),
    "PCIe 3": link(1e9, 12e9, downscale=4e9),
    "H100, one-pass update": link(4e9, 50e9),
    "H100, one-pass update, 6 bytes": link(4e9, 50e9, state_bytes=6),
}


def schedule(numel: int = 3_850_000_000, size: int = 100_000_000) -> None:
    print("schedules on a virtual clock, 3.85e9 parameters in subgroups of 1e8")
    for name, rates in CASES.items():
        plan = plan_offload(numel, rates, subgroup_numel=size)
        strides = {}
        for stride in range(2, 8):
            tasks = published_tasks(-(-numel // size), stride)
            staged = ("state_in", "device", "state_out")
            lasts = [task_seconds(t, size, "staged" if t.lane in staged else "host", rates) for t in tasks]
            strides[stride] = max(end for _, end in play(tasks, lasts))
        best = min(strides, key=lambda k: strides[k])
        print(
            f"  {name:38} host only {numel * rates.host_seconds:.2f} s, x {staged_fraction(rates):.2f}, "
            f"ours {plan.seconds:.3f} s ({plan.seconds / plan.bound_seconds - 1:+.1%} over the bound), published "
            f"formula k={published_stride(rates)}, its best k={best}: {strides[best]:.3f} s, "
            f"{strides[best] / plan.seconds:.2f}x ours"
        )


def clip(numel: int, threads: int, repeats: int, late: float = 0.2) -> None:
    """late: seconds that a norm over ranks takes to come, in which this processor has nothing to do."""
    torch.set_num_threads(threads)
    print(f"clipping, {numel / 1e6:.0f} M parameters, {threads} threads, {repeats} repeats")
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.randn(numel).to(dtype))
        gradient = torch.randn(numel).to(dtype)
        parameter.grad = gradient.clone()
        optimizer = OffloadedAdamW([parameter], plan=lambda n: on_host(n, 1 << 23), spare_bytes=1e12)

        def late_norm() -> float:
            time.sleep(late)
            return 1.0

        def plain(wait: float = 0.0, parameter: nn.Parameter = parameter, step: Any = optimizer.step) -> None:
            time.sleep(wait)
            if not wait:
                nn.utils.clip_grad_norm_([parameter], 1e9)
            step()

        def in_vain(step: Any = optimizer.step_clipped, grad: Any = parameter.grad, old: Any = gradient) -> None:
            step(1e-3)
            grad.copy_(old)

        calls: dict[str, Callable[[], object]] = {
            "norm, then update": plain,
            "update while the norm is found": partial(optimizer.step_clipped, 1e9),
            "the same, in vain": in_vain,
            "norm that comes late, then update": partial(plain, late),
            "update while the norm comes": partial(optimizer.step_clipped, 1e9, late_norm),
        }
        found = take_turns(calls, repeats)
        for name, seconds in found.items():
            median, best = statistics.median(seconds) * 1e3, min(seconds) * 1e3
            print(f"  {str(dtype)[6:]:9} {name:34} median {median:.0f} ms, best {best:.0f} ms")
        plains, earlies = ("norm, then update", "norm that comes late, then update"), list(calls)[1::3]
        for one, other in zip(plains, earlies, strict=True):
            print(f"  {str(dtype)[6:]:9} {one} / {other}:", ratio(found[one], found[other]))


# -- on a GPU


class Stack(nn.Module):
    """Square layers in bf16: many parameters, little else."""

    def __init__(self, numel: int, width: int = 4096) -> None:
        super().__init__()
        layers = [nn.Linear(width, width, bias=False) for _ in range(max(1, numel // width**2))]
        self.layers = nn.ModuleList(layers).to(torch.bfloat16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden.float().square().mean()


def measure_rates(device: torch.device, threads: int, numel: int = 1 << 26) -> OffloadRates:
    """Returns what this machine's lanes do, each alone, in about two seconds."""

    def best(call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize(device)
        found = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
        return min(found)

    there, here = torch.zeros(numel, device=device), torch.zeros(numel, pin_memory=True)
    on_device: State = tuple(torch.zeros(numel, device=device) for _ in range(3))  # type: ignore[assignment]
    state: State = (here, torch.zeros(numel), torch.zeros(numel))
    gradient = torch.zeros(numel, dtype=torch.bfloat16)
    update, on_gpu = SegmentUpdate(state, gradient, OPTIONS, 0, numel, gradient.clone()), gradient.to(device)
    return OffloadRates(
        host_update=numel / best(lambda: open_host_update()([update], threads)),
        device_update=numel / best(lambda: TorchUpdate()([SegmentUpdate(on_device, on_gpu, OPTIONS, 0, numel)])),
        to_device=here.nbytes / best(lambda: there.copy_(here, non_blocking=True)),
        to_host=here.nbytes / best(lambda: here.copy_(there, non_blocking=True)),
    )


def iterations(forward: Callable[[], torch.Tensor], update: Callable[[torch.Tensor], None], count: int) -> list[float]:
    found = []
    for _ in range(count + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        update(forward())
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[2:]


def ours_on_gpu(
    numel: int, device: torch.device, plan: Callable[[int], OffloadPlan], batch: torch.Tensor, repeats: int
) -> list[float]:
    torch.manual_seed(0)
    model = Stack(numel).to(device)
    optimizer = OffloadedAdamW(model.parameters(), lr=1e-4, plan=plan)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(optimizer.gradient_ready)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return iterations(lambda: model(batch), update, repeats)


def deepspeed_on_gpu(numel: int, offload: dict[str, Any], batch: torch.Tensor, repeats: int) -> list[float]:
    import deepspeed

    torch.manual_seed(0)
    model = Stack(numel)
    config = {
        "train_micro_batch_size_per_gpu": len(batch),
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3, "sub_group_size": 1e8, "offload_optimizer": {"device": "cpu"} | offload},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def update(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    found = iterations(lambda: engine(batch), update, repeats)
    engine.destroy()
    return found


def gpu(numel: int, threads: int, repeats: int) -> None:
    if not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device that torch can use")
    device = torch.device("cuda", torch.cuda.current_device())
    rates = measure_rates(device, threads)
    print(rates)
    batch = torch.randn(8, 4096, device=device, dtype=torch.bfloat16)
    size = min(1 << 25, max(1 << 20, numel // 40 // 16 * 16))
    memory = OffloadMemory(staging=0.8 * torch.cuda.mem_get_info(device)[0])
    plan = plan_offload(numel, rates, memory, subgroup_numel=size)
    print(f"predicted update {plan.seconds:.3f} s, bound {plan.bound_seconds:.3f} s")

    def all_on_host(n: int) -> OffloadPlan:
        return replace(on_host(n, size), apart=True)

    runs: dict[str, Callable[[], list[float]]] = {
        "ours, planned": lambda: ours_on_gpu(
            numel, device, lambda n: plan_offload(n, rates, memory, subgroup_numel=size), batch, repeats
        ),
        "ours, all on the host": lambda: ours_on_gpu(numel, device, all_on_host, batch, repeats),
    }
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        print("DeepSpeed is not installed: pip install deepspeed==0.19.8, then start with `deepspeed --num_gpus 1`")
    else:
        peers = {
            "ZeRO-Offload": {"pin_memory": True},
            "ZeRO-Offload, ratio 0.8": {"pin_memory": True, "ratio": 0.8},
            "SuperOffload": {"pin_memory": True, "super_offload": True, "cpuadam_cores_perc": 0.8},
        }
        runs |= {name: lambda o=o: deepspeed_on_gpu(numel, o, batch, repeats) for name, o in peers.items()}  # type: ignore[misc]
    for name, run in runs.items():
        found = run()
        print(
            f"  {name:26} median {statistics.median(found) * 1e3:.0f} ms an iteration, best {min(found) * 1e3:.0f} ms"
        )
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("host", "disk", "schedule", "clip", "gpu"))
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="for `host`")
    parser.add_argument("--folder", type=Path, help="for `disk`: on the disk that is measured")
    arguments = parser.parse_args()
    numel = int(arguments.parameters)
    if arguments.what == "host":
        host(numel, arguments.threads, arguments.repeats, arguments.clock)
    elif arguments.what == "disk":
        if arguments.folder is None:
            parser.error("disk needs --folder")
        disk(numel, arguments.folder, arguments.repeats)
    elif arguments.what == "schedule":
        schedule()
    elif arguments.what == "clip":
        clip(numel, arguments.threads, arguments.repeats)
    else:
        gpu(numel, arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
