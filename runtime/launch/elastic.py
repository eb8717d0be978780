"""`heteromesh run --fault-tolerance`: our agent on each host; torchrun's restarts all workers for the loss of one."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

from heteromesh.errors import UserError
from heteromesh.faults.coordinator.main import read_secret
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.runtime.launch.agent import Agent, AgentSpec, say
from heteromesh.runtime.launch.places import first_place, host_index, nic_addresses
from heteromesh.runtime.launch.rendezvous import Rendezvous, is_here, meet, meet_here
from heteromesh.runtime.process.environment import environment_of, parse_addresses
from heteromesh.runtime.process.failure import PeerLost

MAX_RESTARTS = 3
GRACE = 30.0
PATIENCE = 60.0
_GATHER = 2.0
"""Seconds that the first members wait for those that start at the same time; who comes later is given the state."""
_SILENCE, _STUCK = 1.0, 30.0
"""Seconds: training has longer pauses than sums alone, and a false alarm costs a restart."""
_WITHOUT_USE: dict[str, object] = {
    "master_addr": "127.0.0.1",
    "master_port": None,
    "monitor_interval": 0.1,
    "start_method": "spawn",
    "event_log_handler": "null",
    "role": "default",
    "run_path": False,
    "log_dir": None,
    "redirects": "0",
    "tee": "0",
    "local_ranks_filter": "",
    "duplicate_stdout_filters": [],
    "duplicate_stderr_filters": [],
    "logs_specs": None,
    "numa_binding": None,
    "virtual_local_rank": False,
}
"""torchrun's options that this agent does not know, with their defaults."""
_NO_MEMBER = ("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
"""What torchrun gives its workers and these have none of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of fault tolerance to `heteromesh run`'s parser."""
    ours = parser.add_argument_group("fault tolerance (docs/elastic-launch.md)")
    ours.add_argument(
        "--fault-tolerance",
        "--fault_tolerance",
        action="store_true",
        help="lost workers cost the others nothing: they go on, and the lost ones are started again and join them",
    )
    ours.add_argument(
        "--min-ranks",
        "--min_ranks",
        type=int,
        metavar="K",
        help="fewer ranks than this wait for others (default: MIN of --nnodes MIN:MAX times processes a host, else 1)",
    )
    ours.add_argument(
        "--secret-file",
        "--secret_file",
        type=Path,
        metavar="FILE",
        help="what every host of the job must know (default: environment variable HETEROMESH_SECRET)",
    )
    if "PET_MAX_RESTARTS" not in os.environ:
        parser.set_defaults(max_restarts=None)  # 0 for torchrun, MAX_RESTARTS here
    if "PET_NODE_RANK" not in os.environ:
        parser.set_defaults(node_rank=None)  # 0 for torchrun, told by the cluster file or unknown here


def refuse_arguments(options: argparse.Namespace) -> None:
    """Refuses what only goes with fault tolerance. Raises UserError."""
    for name in ("min_ranks", "secret_file"):
        if getattr(options, name) is not None:
            flag = _flag(name)
            raise UserError(f"{flag} is for jobs that outlive their ranks: give --fault-tolerance too, or leave it out")


def launch(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Runs this host's part of the job; returns the exit code. `environment`: more variables for the workers."""
    _check(options)
    processes = determine_local_world_size(str(options.nproc_per_node))
    bounds, patience = _bounds(options, processes), _patience(options)
    secret = _secret(options)
    try:
        place = _meet(
            options, secret.encode(), bounds, Timing(gather=_GATHER, patience=patience, silence=_SILENCE, stuck=_STUCK)
        )
    except PeerLost as error:
        say(f"error: {error}")
        return 1
    try:
        spec = _agent_spec(options, environment, processes, place, secret, bounds)
        return Agent(spec, coordinator=place.coordinator, patience=patience).run()
    finally:
        if place.coordinator is not None:
            place.coordinator.stop()


def _check(options: argparse.Namespace) -> None:
    for name, default in _WITHOUT_USE.items():
        if getattr(options, name) != default:
            raise UserError(f"{_flag(name)} has no effect with --fault-tolerance: leave one of the two out")
    if options.rdzv_backend not in ("static", "c10d"):
        raise UserError(
            f"--rdzv-backend {options.rdzv_backend} can't be used with --fault-tolerance, whose coordinator is the "
            "rendezvous: leave it out and name the coordinator with --rdzv-endpoint HOST:PORT"
        )
    if options.standalone and options.rdzv_endpoint:
        raise UserError("--standalone is for one host and --rdzv-endpoint for several: give one of them")
    if options.module and options.no_python:
        raise UserError("--module and --no-python exclude each other: give one of them")
    if options.max_restarts is not None and options.max_restarts < 0:
        raise UserError(f"--max-restarts {options.max_restarts} is no number of times: give 0 or more")


def _bounds(options: argparse.Namespace, processes: int) -> Bounds:
    fewest, hosts = parse_min_max_nnodes(options.nnodes)
    if not 1 <= fewest <= hosts:
        raise UserError(f"--nnodes {options.nnodes} is not MIN:MAX with 1 <= MIN <= MAX: write for example 2:4")
    if hosts > 1 and not options.rdzv_endpoint:
        raise UserError(
            f"--nnodes {options.nnodes} is for several hosts, which must find each other: name the coordinator's host "
            "and port with --rdzv-endpoint HOST:PORT"
        )
    least = fewest * processes if fewest != hosts else 1
    if options.min_ranks is not None:
        least = options.min_ranks
    # a cluster file knows hosts with other numbers of devices too
    most = load_cluster(Path(options.cluster)).ranks if options.cluster else hosts * processes
    if not 1 <= least <= most:
        raise UserError(
            f"--min-ranks {least} can't be met: --nnodes {options.nnodes} with {processes} processes a host has "
            f"1 to {most} ranks"
        )
    if most > Bounds().max:
        raise UserError(f"{most} ranks are more than the {Bounds().max} that --fault-tolerance takes: start fewer")
    return Bounds(min=least, max=most)


def _patience(options: argparse.Namespace) -> float:
    """Reads torchrun's own option for it: --rdzv-conf join_timeout=SECONDS."""
    if not options.rdzv_conf:
        return PATIENCE
    key, _, value = options.rdzv_conf.partition("=")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if key.strip() != "join_timeout" or not 0 < seconds < float("inf"):
        raise UserError(
            f"--rdzv-conf {options.rdzv_conf} can't be used with --fault-tolerance: only join_timeout=SECONDS can, how "
            "long too few ranks wait for others"
        )
    return seconds


def _secret(options: argparse.Namespace) -> str:
    """Returns the secret as text, as it goes through the environment."""
    if not options.rdzv_endpoint:
        if options.secret_file is not None:
            raise UserError(f"--secret-file {options.secret_file} is for several hosts: give --rdzv-endpoint too")
        return secrets.token_bytes(32).hex()
    try:
        text = read_secret(options.secret_file).decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError("the secret is not text, so it can't be given to workers: make one with openssl rand -hex 32")
    return text


def _meet(options: argparse.Namespace, secret: bytes, bounds: Bounds, timing: Timing) -> Rendezvous:
    hosts = [host.strip() for host in (options.local_addr or "").split(",") if host.strip()]
    for host in hosts:
        if not is_here(host):
            raise UserError(f"--local-addr {host} is no address of this host: give one of its own, or leave it out")
    if not options.rdzv_endpoint:
        return meet_here(secret, bounds, timing, say)
    return meet(parse_addresses(options.rdzv_endpoint, "--rdzv-endpoint"), secret, bounds, timing, hosts=hosts, say=say)


def _agent_spec(
    options: argparse.Namespace,
    more: Mapping[str, str],
    processes: int,
    place: Rendezvous,
    secret: str,
    bounds: Bounds,
) -> AgentSpec:
    names = [f"{socket.gethostname()}:{rank}" for rank in range(processes)]
    cluster = load_cluster(Path(options.cluster)) if options.cluster else None
    host = host_index(cluster, options.node_rank, one_host=parse_min_max_nnodes(options.nnodes)[1] == 1)
    first = first_place(cluster, host, processes)
    alone = options.local_addr or not options.rdzv_endpoint
    hosts = place.hosts if alone else nic_addresses(cluster, host, place.hosts)
    shared = {
        k: v for k, v in os.environ.items() if k not in _NO_MEMBER and not k.startswith(("TORCHELASTIC_", "MASTER_"))
    }
    if processes > 1:
        shared.setdefault("OMP_NUM_THREADS", "1")
    own = [
        environment_of(
            coordinators=place.coordinators,
            secret=secret,
            name=name,
            hosts=hosts,
            bounds=bounds,
            place=None if first is None else first + rank,
        )
        | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        for rank, name in enumerate(names)
    ]
    return AgentSpec(
        command=_command(options),
        environments=[{**shared, **more, **mine} for mine in own],
        names=names,
        max_restarts=MAX_RESTARTS if options.max_restarts is None else options.max_restarts,
        signals=_signals(options.signals_to_handle),
        grace=GRACE if options.shutdown_timeout is None else float(options.shutdown_timeout),
    )


def _command(options: argparse.Namespace) -> list[str]:
    """Builds the command as torchrun does."""
    python = [os.environ.get("PYTHON_EXEC", sys.executable), "-u", *(["-m"] if options.module else [])]
    return [*([] if options.no_python else python), options.training_script, *options.training_script_args]


def _signals(names: str) -> list[int]:
    try:
        return [signal.Signals[name.strip()] for name in names.split(",") if name.strip()]
    except KeyError as unknown:
        raise UserError(
            f"--signals-to-handle {names} has {unknown}, which is no signal: write SIGTERM,SIGINT"
        ) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
