"""The coordinator as a process of its own: `python -m heteromesh.faults.coordinator`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.diagnosis.monitor import Monitor
from heteromesh.faults.membership.membership import Bounds

SECRET = "HETEROMESH_SECRET"
_LEAST_SECRET = 16
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_EPILOG = """\
The secret is what every member must know, 16 bytes or more; it is never an argument, which other users could read.
Exit codes: 0 when told to end (SIGTERM, Ctrl-C), 1 when the members it has left are outvoted, 2 for bad input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serves one job until it is told to end; the exit code. Prints its address once it listens."""
    options = _parser().parse_args(argv)
    try:
        if not 0 <= options.port < 1 << 16:
            raise UserError(f"--port {options.port} is no port: give one of 0 to 65535")
        coordinator = Coordinator(
            read_secret(options.secret_file),
            host=options.host,
            port=options.port,
            bounds=read_bounds(options.members),
            monitor=Monitor(directory=options.run_dir, say=_say, evicts=options.evict_slow, steps=options.steps),
        )
        # blocked before its thread starts: the signals are for the wait below alone
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        coordinator.start()
    except UserError as error:
        print(f"heteromesh.faults.coordinator: error: {error}", file=sys.stderr)
        return 2
    print("listening on {}:{}".format(*coordinator.address), flush=True)
    while coordinator.running:
        if signal.sigtimedwait(_SIGNALS, 0.2) is not None:
            coordinator.stop()
    if coordinator.ended:
        print(f"heteromesh.faults.coordinator: {coordinator.ended}", file=sys.stderr)
    return 1 if coordinator.ended else 0


def _say(line: str) -> None:
    print(f"heteromesh.faults.coordinator: {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m heteromesh.faults.coordinator",
        description="Decides epochs and commits for the members of one job.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of this machine to listen on; for members on other hosts the one that they reach, or 0.0.0.0 "
        "for all (default: 127.0.0.1, this host alone)",
    )
    parser.add_argument("--port", type=int, default=29400, help="0: any free one (default: 29400)")
    parser.add_argument("--members", default="1:256", metavar="MIN:MAX", help="how many the job needs and takes")
    parser.add_argument("--secret-file", type=Path, metavar="FILE", help=f"default: environment variable {SECRET}")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where events.jsonl is written")
    parser.add_argument("--evict-slow", action="store_true", help="put out a member that costs more than it does")
    parser.add_argument("--steps", type=int, metavar="N", help="of the whole job: how long a slow member would matter")
    return parser


def read_bounds(text: str) -> Bounds:
    """Reads MIN:MAX, or N for exactly so many. Raises UserError."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    try:
        if match is not None:
            return Bounds(min=int(match[1]), max=int(match[2] or match[1]))
    except ValueError:
        pass
    raise UserError(f"--members {text} is not MIN:MAX with 1 <= MIN <= MAX <= 256: write for example 4:8")


def read_secret(file: Path | None) -> bytes:
    """Returns the file's bytes without the line's end, or the environment variable's. Raises UserError."""
    if file is None:
        where, secret = f"environment variable {SECRET}", os.environ.get(SECRET, "").encode()
        if not secret:
            raise UserError(f"no secret is given: name a file with --secret-file, or set the {where}")
    else:
        where = f"--secret-file {file}"
        try:
            mode = file.stat().st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise UserError(
                    f"{where} can be read by other users (mode {stat.S_IMODE(mode):o}): take that from them with "
                    f"chmod 600 {file}"
                )
            secret = file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror}): give a file that this user may read") from None
    if len(secret) < _LEAST_SECRET:
        raise UserError(
            f"the secret of {where} has {len(secret)} bytes and needs {_LEAST_SECRET}: "
            "make one with openssl rand -hex 32"
        )
    return secret
