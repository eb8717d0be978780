"""`heteromesh doctor`: what is installed and what works on this machine, tried and not assumed.

The output is made for pasting into an issue: no paths, no host names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import heteromesh
from heteromesh.runtime.cli.arguments import Parser
from heteromesh.runtime.cli.terminal import say

Status = Literal["ok", "warn", "fail"]
LOOPBACK_SECONDS = 15.0
"""Without any of the processor, after which two processes are taken to wait for nothing. Not how long they take: that
is about 4 s on an idle machine, and minutes on a busy one."""
LOOPBACK_CPU_SECONDS = 120.0
"""Of the processor, which two processes that work never need."""
EXTRAS = ("deepspeed", "megatron-core", "transformers", "tensorboard", "tokenizers", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The outcome of a check."""

    check: str
    status: Status
    detail: str
    seconds: float = 0.0


class Broken(Exception):
    """A check's way to say that something does not work; the message is its detail."""


class Doubtful(Exception):
    """A check's way to say that something works less well than it could."""


def main(argv: Sequence[str]) -> int:
    """Runs every check; returns 1 if one fails."""
    parser = Parser("doctor", "Tries what this machine can do. Exits with 1 if something that is needed does not work.")
    parser.add_argument("--json", action="store_true", help="one JSON document and nothing else")
    args = parser.parse(argv)
    findings = [run_check(name, check) for name, check in CHECKS]
    failed = any(f.status == "fail" for f in findings)
    if args.json:
        print(
            json.dumps(
                {"heteromesh": heteromesh.__version__, "ok": not failed, "checks": [asdict(f) for f in findings]}
            )
        )
    else:
        width = max(len(f.check) for f in findings)
        say("\n".join(f"{f.status:<4}  {f.check:<{width}}  {f.detail}" for f in findings))
    return int(failed)


def run_check(name: str, check: Callable[[], str]) -> CheckResult:
    """Runs one check and times it; any exception of a check is a finding, not an end."""
    began = time.perf_counter()
    status: Status = "ok"
    try:
        detail = check()
    except Doubtful as error:
        status, detail = "warn", str(error)
    except Broken as error:
        status, detail = "fail", str(error)
    except Exception as error:
        # The type alone: messages of foreign errors hold paths.
        status, detail = "fail", f"raised {type(error).__name__}"
    return CheckResult(check=name, status=status, detail=detail, seconds=time.perf_counter() - began)


def check_python() -> str:
    """Describes the interpreter and the system."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{system}, heteromesh {heteromesh.__version__}"


def check_solver() -> str:
    """Solves a knapsack with a known optimum by HiGHS through PuLP."""
    import pulp

    problem = pulp.LpProblem("doctor", pulp.LpMaximize)
    take = [problem.add_variable(f"take{i}", cat="Binary") for i in range(3)]
    problem += pulp.lpSum(value * t for value, t in zip((6, 5, 5), take, strict=True))
    problem += pulp.lpSum(weight * t for weight, t in zip((6, 5, 5), take, strict=True)) <= 10
    problem.solve(pulp.HiGHS(msg=False, timeLimit=5))
    chosen = [round(t.value() or 0) for t in take]
    if chosen != [0, 1, 1]:
        raise Broken(f"HiGHS chose {chosen} where [0, 1, 1] is the optimum: reinstall pulp and highspy")
    return f"PuLP {_version('pulp')} with HiGHS {_version('highspy')} solved an integer program"


def check_planner() -> str:
    """Plans a step for two processes and checks it."""
    from heteromesh.planner.cluster.cluster import local_cluster
    from heteromesh.planner.cost.measured import bind
    from heteromesh.planner.model.constants import Constants
    from heteromesh.planner.report.check import check_step
    from heteromesh.planner.sequences.step import plan_step

    constants = Constants(
        seconds_per_token2=1e-8,
        seconds_per_token=1e-5,
        seconds_per_pass=1e-3,
        bytes_per_token=1e3,
        tokens_per_device=600,
        bytes_per_second={2: 1e9},
    )
    costs = bind(constants, local_cluster(2))
    step = plan_step([1000, 200, 100, 50], costs)
    check_step(step, costs)
    return f"planned 4 sequences for 2 ranks in {step.solve_seconds * 1e3:.1f} ms"


def check_torch() -> str:
    """Describes torch itself."""
    import torch

    if not torch.distributed.is_available():
        raise Broken(f"torch {torch.__version__} is built without torch.distributed: install another build")
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def check_attention() -> str:
    """Compares flash attention of a pass with two packed sequences, forward and backward, with the formula (CPU)."""
    import torch

    from heteromesh.comm.world import World
    from heteromesh.parallel.attention.api import attention, prepare_pass
    from heteromesh.planner.plan import Pass

    lengths = (20, 13)
    plan = Pass(ranks=(0,), method="local", sequences=(0, 1), shards=(lengths,), seconds=0.0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 33, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    weight = torch.randn(1, 4, 33, 16, generator=generator)
    with prepare_pass(plan, lengths, World(), (1.0,)).active():
        packed = attention(q, k, v)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    seen = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    scores = (q @ keys.transpose(-1, -2) / math.sqrt(16)).masked_fill(~seen, -math.inf)
    outputs = (packed, scores.softmax(-1) @ values)
    ours, plain = ((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))) for out in outputs)
    worst = max(float((a - b).abs().max().detach()) for a, b in zip(ours, plain, strict=True))
    if not worst < 1e-4:
        raise Broken(f"attention differs from the plain formula by {worst:.1e}: install another build of torch")
    return f"forward and backward equal the plain formula within {worst:.0e}"


def check_loopback() -> str:
    """Runs an all-reduce between two processes over gloo, through our own world."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    code = "from heteromesh.runtime.cli.doctor import loopback_rank; loopback_rank()"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _wait_while_working(ranks)
        sums = [rank.communicate()[0].strip() for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.communicate()
    if sums != ["3.0", "3.0"]:
        raise Broken(f"two gloo processes summed 1 and 2 to {sums}: check that a firewall leaves 127.0.0.1 alone")
    return "two gloo processes on 127.0.0.1 summed a tensor"


def _wait_while_working(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Returns when all have ended. Raises Broken when those that run have not worked for long, or far too much."""
    used, since = -1.0, time.monotonic()
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        now = sum(_cpu_seconds(process.pid) for process in processes if process.returncode is None)
        if now != used:
            used, since = now, time.monotonic()
        if time.monotonic() - since > LOOPBACK_SECONDS or used > LOOPBACK_CPU_SECONDS:
            raise Broken(
                f"two processes did not finish an all-reduce: the last {LOOPBACK_SECONDS:.0f} s they only waited, so "
                "check that a firewall leaves 127.0.0.1 alone"
            )


def _cpu_seconds(pid: int) -> float:
    """Returns the processor's time that a process has used, 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loopback_rank() -> None:
    """One of `check_loopback`'s processes: prints the sum of both ranks' numbers."""
    from datetime import timedelta

    import torch

    from heteromesh.comm.world import join_world

    with join_world(timedelta(minutes=10)) as world:
        print(float(world.sum(torch.tensor([float(world.rank + 1)]))))


def check_reach() -> str:
    """Starts the store of a one-host job and looks whether this host's other addresses lead to it."""
    from heteromesh.runtime.launch.loopback import LoopbackRendezvous

    held = LoopbackRendezvous("doctor", 0).next_rendezvous()
    assert held.bootstrap_store_info is not None
    port = held.bootstrap_store_info.master_port
    found = socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET, socket.SOCK_STREAM)
    for address in sorted({where[4] for where in found}):
        if not str(address[0]).startswith("127."):
            with socket.socket() as probe:
                probe.settimeout(LOOPBACK_SECONDS)
                if probe.connect_ex(address) == 0:
                    raise Broken("other hosts can reach the store of a job of this host alone: start jobs in a sandbox")
    return (
        "a job of this host alone can't be reached from others; jobs of several hosts need a network that is trusted: "
        "torchrun's store and gloo know no secret"
    )


def check_nvidia() -> str:
    """Describes NVIDIA devices by their management library; multiplies matrices on the first where torch has CUDA."""
    import torch

    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        raise Doubtful("nvidia-ml-py is not installed, so devices can't be asked: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "no NVIDIA driver: ranks run on the CPU"
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    what = f"{len(names)} devices ({', '.join(sorted(set(names)))}), driver {driver}"
    if not torch.cuda.is_available():
        raise Doubtful(f"{what}, but this torch can't use them: install a CUDA build of torch")
    square = torch.ones(64, 64, device="cuda")
    if float((square @ square).sum()) != 64**3:
        raise Broken(f"{what}, but a matrix product on the first one is wrong")
    return f"{what}; a matrix product on the first one is right"


def check_files() -> str:
    """Writes a file in the temporary directory and reads it back."""
    data = os.urandom(1 << 16)
    try:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            same = file.read() == data
    except OSError as error:
        raise Broken(f"can't write a temporary file ({error.strerror}): set TMPDIR to a writable directory") from None
    if not same:
        raise Broken("a temporary file did not hold what was written to it: set TMPDIR to another disk")
    return "wrote, synced and read back a temporary file"


def check_extras() -> str:
    """Versions of optional packages, without importing them."""
    return ", ".join(f"{name} {_version(name) or 'not installed'}" for name in EXTRAS)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


CHECKS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("python", check_python),
    ("solver", check_solver),
    ("planner", check_planner),
    ("torch", check_torch),
    ("attention", check_attention),
    ("loopback", check_loopback),
    ("reach", check_reach),
    ("nvidia", check_nvidia),
    ("files", check_files),
    ("extras", check_extras),
)
