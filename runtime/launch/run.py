"""`heteromesh run`: torchrun's own parser and launcher, and some flags more.

A script that knows nothing of Heteromesh runs as under torchrun. A `Trainer` finds the cluster and plan files in the
environment. A job of one host listens on the loopback interface only. Failures are told once: a user's mistake as its
sentence (exit code 2), anything else as torchrun's table of failed ranks (exit code 1). With --fault-tolerance the
agent of runtime/launch/elastic.py starts the workers.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import determine_local_world_size, get_args_parser, parse_min_max_nnodes
from torch.distributed.run import run as torchrun

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.plan import load
from heteromesh.runtime.launch.elastic import add_arguments, launch, refuse_arguments
from heteromesh.runtime.launch.loopback import stay_on_loopback
from heteromesh.runtime.launch.reaper import Reaper
from heteromesh.runtime.launch.worker import error_text
from heteromesh.runtime.process.failure import UNDER_HETEROMESH_RUN
from heteromesh.runtime.process.variables import CLUSTER_VARIABLE, DRY_RUN_VARIABLE, PLAN_VARIABLE


def main(argv: list[str]) -> int:
    """Starts the script on every device; returns the exit code."""
    options = _parser().parse_args(argv)
    ranks = _ranks(options)
    _check_files(options, ranks)
    environment = {}
    if options.cluster:
        environment[CLUSTER_VARIABLE] = str(Path(options.cluster).resolve())
    if options.plan != "auto":
        environment[PLAN_VARIABLE] = str(Path(options.plan).resolve())
    if options.dry_run:
        return _dry_run(options, environment, ranks)
    if options.fault_tolerance:
        return launch(options, environment)
    refuse_arguments(options)
    options.max_restarts, options.node_rank = options.max_restarts or 0, options.node_rank or 0
    stay_on_loopback(options)
    return _launch(options, environment)


def _launch(options: argparse.Namespace, environment: dict[str, str]) -> int:
    """Lets torchrun start the workers, none of which outlives this process; returns the exit code."""
    job = secrets.token_hex(8)
    os.environ.update(environment | {UNDER_HETEROMESH_RUN: job})
    if "LOGLEVEL" not in os.environ:
        # the failure is told below, once; the launcher's log would tell it again in ten lines
        for name in ("torch.distributed.elastic", "torch.distributed.run"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    reaper = Reaper()
    reaper.watch_environment(f"{UNDER_HETEROMESH_RUN}={job}")
    try:
        torchrun(options)
    except SignalException as signal:
        return 128 + int(signal.sigval)
    except ChildFailedError as error:
        return _tell(error)
    finally:
        reaper.forget_environment(f"{UNDER_HETEROMESH_RUN}={job}")
        reaper.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    parser.prog = "heteromesh run"
    parser.description = "Starts a training script on every device: torchrun with a plan for every step."
    ours = parser.add_argument_group("heteromesh")
    ours.add_argument(
        "--cluster", metavar="FILE", help="cluster.toml that describes the devices (docs/cluster-file.md)"
    )
    ours.add_argument(
        "--plan", metavar="FILE|auto", default="auto", help="plan.json to follow; auto: plan every step while training"
    )
    ours.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="run the script in one process up to Trainer.fit, print the plan of its first steps and stop",
    )
    add_arguments(parser)
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (see `heteromesh run --help`)")


def _ranks(options: argparse.Namespace) -> int | None:
    """Processes of the whole job, where the flags alone tell."""
    try:
        least, most = parse_min_max_nnodes(options.nnodes)
    except (ValueError, RuntimeError):
        raise UserError(f"--nnodes {options.nnodes} is not a number of hosts: give N or MIN:MAX") from None
    if least != most:
        return None
    try:
        here: int = determine_local_world_size(str(options.nproc_per_node))
    except ValueError as error:
        raise UserError(f"--nproc-per-node {options.nproc_per_node} can't be used here: {error}") from None
    if here < 1:
        raise UserError(f"--nproc-per-node {options.nproc_per_node} starts nothing: give at least 1")
    # hosts may start different numbers of processes: only one host's number is known here
    return here if most == 1 else None


def _check_files(options: argparse.Namespace, ranks: int | None) -> None:
    """Finds what is wrong before any process starts."""
    script = Path(options.training_script)
    if not (options.module or options.no_python or script.is_file()):
        raise UserError(f"training script {script} does not exist: give the path of a Python file (or -m MODULE)")
    cluster = load_cluster(Path(options.cluster)) if options.cluster else None
    plan = load(Path(options.plan)) if options.plan != "auto" else None
    for what, described in (
        (f"cluster file {options.cluster}", cluster and cluster.ranks),
        (f"plan file {options.plan}", plan and plan.cluster.ranks),
    ):
        if described and ranks and described != ranks:
            raise UserError(
                f"{what} is for {described} ranks and --nproc-per-node starts {ranks}: "
                f"start {described} processes, or use a file for {ranks}"
            )
    if cluster and plan and cluster.fingerprint != plan.cluster.fingerprint:
        raise UserError(
            f"plan file {options.plan} is for the cluster {plan.cluster.fingerprint} and {options.cluster} is "
            f"{cluster.fingerprint}: make the plan again with this cluster file"
        )


def _dry_run(options: argparse.Namespace, environment: dict[str, str], ranks: int | None) -> int:
    described = load_cluster(Path(options.cluster)).ranks if options.cluster else ranks
    if described is None:
        raise UserError("--dry-run can't tell how many ranks there will be: give --cluster or a single host's flags")
    command = [] if options.no_python else [sys.executable, *(["-m"] if options.module else [])]
    command += [options.training_script, *options.training_script_args]
    return subprocess.run(command, env=os.environ | environment | {DRY_RUN_VARIABLE: str(described)}).returncode


def _tell(error: ChildFailedError) -> int:
    """Prints why the first rank failed; returns the exit code."""
    failures = sorted(error.failures.values(), key=lambda f: int(f.timestamp))
    # a rank that ended with a user's mistake is the cause; its peers then lost it
    for kind, code in (("UserError", 2), ("PeerLost", 1)):
        for failure in failures:
            message = error_text(failure.error_file_data)
            if failure.exitcode == code and message.startswith(f"{kind}: "):
                print(f"heteromesh: error: {message.removeprefix(f'{kind}: ')}", file=sys.stderr)
                return code
    print(error, file=sys.stderr)
    return 1
