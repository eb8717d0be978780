"""The `heteromesh` command: finds the subcommand, and turns exceptions into exit codes.

0 done, 1 failed, 2 bad input or infeasible, 130 interrupted. A subcommand is imported when it is called.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import heteromesh
from heteromesh.errors import UserError

_COMMANDS = {
    "run": ("heteromesh.runtime.launch.run", "start a training script on every device: torchrun's flags and launcher"),
    "plan": ("heteromesh.runtime.cli.plan", "plan steps for a cluster, without any device"),
    "explain": ("heteromesh.runtime.cli.explain", "say why a plan is as it is, or how a run went against its plan"),
    "report": (
        "heteromesh.runtime.cli.report",
        "show a run as one HTML page: steps, ranks, members, delays, diagnoses",
    ),
    "simulate": ("heteromesh.runtime.cli.simulate", "play a plan without any device: slow ranks, failures, a trace"),
    "sandbox": ("heteromesh.runtime.sandbox.cli", "run a command on a cluster's hosts as namespaces of this machine"),
    "probe": ("heteromesh.runtime.probe.cli", "measure devices, links and network cards; write a cluster file"),
    "doctor": ("heteromesh.runtime.cli.doctor", "try what this machine can do"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        print(f"heteromesh: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads any more; without this the interpreter's last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as end:
        return _code(end.code)
    except Exception:
        traceback.print_exc()
        return 1
    return code


def _code(code: object) -> int:
    """Returns what Python itself makes of SystemExit's argument."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"heteromesh {heteromesh.__version__}")
        return 0
    if words[0] not in _COMMANDS:
        close = difflib.get_close_matches(words[0], _COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{words[0]!r} is not a command{hint}: use one of {', '.join(_COMMANDS)}")
    command: int = importlib.import_module(_COMMANDS[words[0]][0]).main(words[1:])
    return command


def _usage() -> str:
    lines = ["usage: heteromesh COMMAND ...", ""]
    lines += [f"  {name:<8} {text}" for name, (_, text) in _COMMANDS.items()]
    lines += ["", "heteromesh COMMAND --help says more; heteromesh --version prints the version."]
    return "\n".join(lines)
