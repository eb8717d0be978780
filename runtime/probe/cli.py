"""`heteromesh probe`: measures devices, links and network cards, and writes a cluster file.

Takes torchrun's flags, as `heteromesh run` does, and starts a module of its own instead of a script.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.model.spec import load_model
from heteromesh.runtime.probe.worker import add_flags, check_output

WORKER = "heteromesh.runtime.probe.worker"


def main(argv: Sequence[str]) -> int:
    """Starts the probe on every device; returns the exit code."""
    from heteromesh.runtime.launch import run

    parser = _parser()
    options = parser.parse_args([*argv, "-m", WORKER])
    if options.training_script != WORKER or options.training_script_args:
        raise UserError(f"{options.training_script!r} is not a flag, and probe starts no script: leave it out")
    if options.nnodes in ("1", "1:1"):
        # rank 0 is here: what it would refuse is known before anything starts
        check_output(options.output, options.force)
        if options.cluster:
            load_cluster(options.cluster)
        if options.model:
            load_model(options.model)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(own)
    ours, of_torchrun = own.parse_known_args(list(argv))
    return run.main([*of_torchrun, "-m", WORKER, *_words(ours)])


def _parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "heteromesh probe"
    parser.description = "Measures devices, links and network cards, and writes a cluster file. torchrun's flags."
    parser.error = _refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest in ("module", "no_python", "run_path", "training_script", "training_script_args"):
            action.help = argparse.SUPPRESS
    add_flags(parser.add_argument_group("heteromesh"))
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (see `heteromesh probe --help`)")


def _words(options: argparse.Namespace) -> list[str]:
    """Returns the flags again, for the worker."""
    words = ["-o", str(options.output)]
    for name in ("model", "cluster"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value else []
    return words + [f"--{name}" for name in ("force", "json") if getattr(options, name)]
