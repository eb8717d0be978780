"""`heteromesh sandbox`: a command on every host of a cluster file, on this one machine."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.runtime.cli.arguments import Parser, number
from heteromesh.runtime.process.interrupt import handled
from heteromesh.runtime.sandbox.faults import SYNTAX, parse_fault
from heteromesh.runtime.sandbox.machine import check_machine
from heteromesh.runtime.sandbox.network import lay_out
from heteromesh.runtime.sandbox.sandbox import Sandbox
from heteromesh.runtime.sandbox.scale import scaled, scaled_file
from heteromesh.runtime.sandbox.supervise import SandboxJob, Sink

_FACTOR = number(lambda f: 0 < f < math.inf, "a number greater than 0: 100 makes 200 Gbit/s 2 Gbit/s")
_MILLISECONDS = number(lambda ms: 0 <= ms <= 10_000, "milliseconds from 0 to 10000")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its first exit status that is not 0."""
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    command = words[split + 1 :]
    if not command and not {"-h", "--help"} & set(words):
        raise UserError("there is no COMMAND to run on the hosts: write heteromesh sandbox cluster.toml -- COMMAND")
    options = _parser().parse(words[:split])
    if options.no_quota and options.cores is not None:
        raise UserError(f"--cores {options.cores:g} and --no-quota contradict each other: leave one out")
    described = load_cluster(options.cluster)
    # a fault's own rates are those of the links that there are
    faults = [parse_fault(spec, scaled(described, options.scale)) for spec in options.fault]
    lay_out(scaled(described, options.scale))
    check_machine()
    if command[0] != "heteromesh" and not shutil.which(command[0]):
        raise UserError(f"COMMAND {command[0]!r} is not found: give a program in PATH or a path of one")
    with (
        handled((signal.SIGTERM, signal.SIGHUP), _end),
        scaled_file(described, options.cluster, options.scale) as (cluster, path),
        Sandbox(
            cluster,
            cluster_file=path,
            cores=options.cores,
            quota=not options.no_quota,
            limit_memory=options.limit_memory,
            latency_ms=options.latency_ms,
        ) as sandbox,
    ):
        sink = None if options.raw or len(cluster.hosts) == 1 else _prefix([host.name for host in cluster.hosts])
        job = SandboxJob(sandbox, command, faults=faults, sink=sink, tell=_tell)
        status = job.wait()
        if job.failed:
            _tell(f"host {job.failed} ended with exit status {status}")
        return status


def _parser() -> Parser:
    parser = Parser("sandbox", "Runs COMMAND on every host of a cluster file, as network namespaces on this machine.")
    parser.usage = "heteromesh sandbox [options] CLUSTER -- COMMAND ..."
    parser.add_argument("cluster", type=Path, metavar="CLUSTER", help="cluster.toml (docs/cluster-file.md)")
    parser.add_argument("--cores", type=float, help="cores that the hosts share (default: 90 %% of this machine's)")
    parser.add_argument("--no-quota", action="store_true", help="don't limit what a host may compute")
    parser.add_argument(
        "--limit-memory", action="store_true", help="kill a host that uses more than the memory_gb of its devices"
    )
    parser.add_argument(
        "--scale", type=_FACTOR, default=1.0, metavar="FACTOR", help="every link at 1/FACTOR of its rate in the file"
    )
    parser.add_argument("--latency-ms", type=_MILLISECONDS, default=0.0, help="one way between hosts; needs netem")
    parser.add_argument("--fault", action="append", default=[], metavar="SPEC", help=f"at a time: {SYNTAX}")
    parser.add_argument("--raw", action="store_true", help="no host names before the lines of output")
    return parser


def _tell(text: str) -> None:
    print(f"sandbox: {text}", file=sys.stderr, flush=True)


def _prefix(names: list[str]) -> Sink:
    width = max(map(len, names))

    def write(host: str, error: bool, line: bytes) -> None:
        stream = (sys.stderr if error else sys.stdout).buffer
        stream.write(f"{host:<{width}} | ".encode() + line.rstrip(b"\n") + b"\n")
        stream.flush()

    return write


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the command as Ctrl-C does, with the signal's exit status."""
    raise SystemExit(128 + number)
