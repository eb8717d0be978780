"""Sequence-parallel attention: every method of ours against peers, on the same work, on CPU processes.

    python benchmarks/attention.py                     # 2 and 4 ranks, CPU time and bytes
    python benchmarks/attention.py --mbit 200          # 4 ranks behind links of 200 Mbit/s (Linux, root)

Forward and backward of one causal attention in bf16, one thread a rank. CPU time is that of all ranks together, bytes
are what a rank's interface sent (TCP's own included). Peers that are not installed are left out and named:
ring-flash-attn 0.1.8, yunchang 0.6.4 (both with benchmarks/flash_attn_cpu.py as their kernel), deepspeed 0.19.8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.runtime.sandbox import Process, Sandbox, why_not

OURS = ("ulysses", "gather", "ring", "trimmed_ring", "bidirectional_ring", "token_ring", "ulysses_ring")
PEERS = (
    "torch ring alltoall",
    "torch ring allgather",
    "ring-flash-attn zigzag",
    "yunchang 2 x ring",
    "DeepSpeed Ulysses",
)
UNLIMITED = 20_000
"""Mbit/s: the most that the sandbox sets."""
RINGS = PEERS[:4]
"""Peers in which keys go round; the slow link is about them."""


def work(kind: str, options: argparse.Namespace, world: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(one forward and backward, the output) of this rank's share."""
    import torch

    from heteromesh.planner.splitting.layout import method_layout

    size, tokens = world.size, options.tokens // world.size
    shards = [[tokens]] * size
    layouts = {"DeepSpeed Ulysses": "ulysses", PEERS[3]: "ulysses_ring:2"}
    layout = method_layout(layouts.get(kind, kind if kind in OURS else "ring"), [options.tokens], shards)
    rows = [t for s in layout.segments[world.rank] for t in range(s.start, s.end)]
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, options.tokens, h, options.dim, generator=generator).bfloat16()
        for h in (options.heads, options.kv_heads, options.kv_heads, options.heads)
    ]
    q, k, v, grad = (t[:, rows].contiguous() for t in whole)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    if kind in OURS:
        attend = ours(kind, options, shards, world)
    elif kind.startswith("torch"):
        return torch_ring(kind, leaves, grad, world), lambda: None
    else:
        attend = {PEERS[2]: ring_flash_attn, PEERS[3]: yunchang, PEERS[4]: deepspeed}[kind](world)

    def run() -> Any:
        out = attend(*leaves)
        torch.autograd.grad(out, leaves, grad)
        return out

    def check() -> None:
        heads_first = [t.transpose(1, 2) for t in whole[:3]]
        exact = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(
            run().detach(), exact.transpose(1, 2)[:, rows], rtol=0.05, atol=0.05, msg=lambda m: f"{kind}: {m}"
        )

    return run, check


def ours(kind: str, options: argparse.Namespace, shards: Any, world: Any) -> Callable[..., Any]:
    from heteromesh.parallel.attention.api import attention, prepare_pass
    from heteromesh.planner.plan import Pass

    plan = Pass(
        ranks=tuple(range(world.size)), method=kind, sequences=(0,), shards=tuple(map(tuple, shards)), seconds=0.0
    )
    context = prepare_pass(plan, [options.tokens], world, (1.0,) * world.size)

    def attend(q: Any, k: Any, v: Any) -> Any:
        with context.active():
            return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attend


def torch_ring(kind: str, leaves: list[Any], grad: Any, world: Any) -> Callable[[], Any]:
    import torch
    import torch.distributed.tensor.experimental._context_parallel._attention as template

    template._cp_options.enable_load_balance = True
    aten, group = torch.ops.aten, torch.distributed.group.WORLD
    heads_first = [t.detach().transpose(1, 2).contiguous() for t in leaves]
    wanted = grad.transpose(1, 2).contiguous()

    def run() -> Any:
        template.set_rotate_method(kind.split()[-1])
        out, lse, *_ = template._templated_ring_attention(
            group, 2, aten._scaled_dot_product_flash_attention_for_cpu, *heads_first, is_causal=True
        )
        template._templated_ring_attention_backward(
            group,
            2,
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            wanted,
            "grad_out",
            *heads_first,
            out,
            lse,
            is_causal=True,
            dropout_p=0.0,
        )
        return out

    return run


def ring_flash_attn(world: Any) -> Callable[..., Any]:
    import flash_attn_cpu

    flash_attn_cpu.install()
    from ring_flash_attn import zigzag_ring_flash_attn_func

    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True)


def yunchang(world: Any) -> Callable[..., Any]:
    import flash_attn_cpu

    flash_attn_cpu.install()
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    if world.size < 4:
        raise ImportError("yunchang's ring of one rank sends to itself, which gloo can't")
    set_seq_parallel_pg(2, world.size // 2, world.rank, world.size)
    layer = LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)
    return lambda q, k, v: layer(q, k, v, causal=True)


def deepspeed(world: Any) -> Callable[..., Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm.torch as backend
    import torch

    backend.build_shm_op = lambda: None  # compiles for minutes
    import deepspeed as library
    from deepspeed.sequence.layer import DistributedAttention

    library.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)

    def local(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    layer = DistributedAttention(local, torch.distributed.group.WORLD, scatter_idx=2, gather_idx=1)

    def attend(q: Any, k: Any, v: Any) -> Any:
        # it wants a key head for every rank; its own model code repeats them too
        repeats = max(1, world.size // k.shape[2])
        return layer(q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2), 0)

    return attend


def sent(interface: str) -> int:
    """Bytes that left through an interface of this namespace; 0 where it is unknown."""
    path = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    return int(path.read_text()) if interface and path.exists() else 0


def worker(options: argparse.Namespace) -> None:
    import torch

    from heteromesh.comm.world import join_world

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with join_world() as world:
        ready: dict[str, Callable[[], Any]] = {}
        for kind in options.kinds.split(","):
            try:
                ready[kind], check = work(kind, options, world)
                check()
                ready[kind]()
            except ImportError as error:
                results[kind] = {"missing": str(error)}
                ready.pop(kind, None)
        for _ in range(options.repeats):
            for kind, run in ready.items():
                entry = results.setdefault(kind, {"seconds": [], "cpu": [], "bytes": []})
                world.barrier()
                before, cpu, clock = sent(options.interface), time.process_time(), time.perf_counter()
                run()
                own = time.perf_counter() - clock, time.process_time() - cpu
                world.barrier()
                seconds, processor, count = zip(*world.gather((*own, sent(options.interface) - before)), strict=True)
                entry["seconds"].append(max(seconds))
                entry["cpu"].append(sum(processor))
                entry["bytes"].append(statistics.mean(count))
        if world.rank == 0:
            Path(options.output).write_text(json.dumps(results))


def launch(size: int, kinds: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Results by kind, of ranks in namespaces where this machine has them."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        words = [sys.executable, __file__, "--worker", "--kinds", ",".join(kinds), "--output", str(output)]
        for name in ("tokens", "heads", "kv_heads", "dim", "repeats"):
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        if why_not():
            return _collect(output, [_alone(words, rank, size) for rank in range(size)])
        nic = Nic(kind="ethernet", gbit=(options.mbit or UNLIMITED) / 1e3)
        machines = tuple(Host(name=f"host{i}", device="cpu", count=1, nics=(nic,)) for i in range(size))
        with Sandbox(Cluster(name="hosts", hosts=machines, devices=CATALOG), quota=False) as sandbox:
            return _collect(
                output,
                [
                    host.start([*words, "--interface", host.interfaces[0].name], environment=_place(rank, size))
                    for rank, host in enumerate(sandbox.hosts)
                ],
            )


def _place(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}


def _alone(words: list[str], rank: int, size: int) -> subprocess.Popen[bytes]:
    """A rank on this machine's own network."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=os.environ | meet | _place(rank, size))


def _collect(output: Path, processes: Sequence[subprocess.Popen[bytes] | Process]) -> dict[str, Any]:
    try:
        for process in processes:
            process.wait(timeout=600)
    finally:
        for process in processes:
            process.kill()
    return json.loads(output.read_text())


def table(size: int, options: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    head = f"W={size}, {options.tokens} tokens, {options.heads}/{options.kv_heads} heads, dim {options.dim}, bf16"
    head += f", links of {options.mbit:g} Mbit/s" if options.mbit else ""
    lines = [f"### {head}", "", "| method | CPU ms, all ranks | wall ms | MB sent a rank |", "|---|---|---|---|"]
    for kind, entry in results.items():
        if "missing" in entry:
            lines.append(f"| {kind} | not run: {entry['missing']} | | |")
            continue
        cpu, seconds, megabytes = min(entry["cpu"]), statistics.median(entry["seconds"]), min(entry["bytes"]) / 1e6
        lines.append(f"| {kind} | {1e3 * cpu:.0f} | {1e3 * seconds:.0f} | {megabytes:.2f} |")
    fine = {k: e for k, e in results.items() if "missing" not in e}
    own, others = ({k: e for k, e in fine.items() if (k in OURS) == mine} for mine in (True, False))
    if own and others:
        cpu = [min(min(e["cpu"]) for e in group.values()) for group in (own, others)]
        rings = [statistics.median(e["seconds"]) for k, e in others.items() if k in RINGS]
        wall = min(statistics.median(e["seconds"]) for e in own.values())
        lines += ["", f"Our least CPU time / the peers' least: {cpu[0] / cpu[1]:.3f}. "]
        lines[-1] += f"Best peer ring's wall time / our best: {min(rings) / wall:.2f}." if rings else ""
    return [*lines, ""]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mbit", type=float, help="rate of each rank's link")
    parser.add_argument("--kinds", default=",".join((*OURS, *PEERS)))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for name in ("--output", "--interface"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        worker(options)
        return
    if options.mbit and why_not():
        sys.exit(f"--mbit: {why_not()}")
    for size in options.ranks:
        print("\n".join(table(size, options, launch(size, tuple(options.kinds.split(",")), options))), flush=True)


if __name__ == "__main__":
    main()
