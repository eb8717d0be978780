"""What the sandbox needs of this machine: root, `ip` and `tc`; and how it calls them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence

from heteromesh.errors import UserError


class ToolError(RuntimeError):
    """`ip` or `tc` refused; the message is the command and what it said."""


def why_not() -> str:
    """Says why this machine can't have a sandbox; empty if it can."""
    if not sys.platform.startswith("linux"):
        return f"this is {sys.platform} and a sandbox is made of Linux network namespaces: use a Linux machine"
    if os.geteuid() != 0:
        return f"a sandbox needs root and this is user {os.geteuid()}: run it with sudo"
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        return f"a sandbox needs {' and '.join(missing)}, not found in PATH: install iproute2"
    return ""


def check_machine() -> None:
    """Raises UserError where there can be no sandbox."""
    reason = why_not()
    if reason:
        raise UserError(reason)


def call(*words: str) -> str:
    """Returns the output of `ip`, `tc` or `sysctl`; raises ToolError."""
    done = _run(words)
    if done.returncode != 0:
        raise ToolError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def batch(tool: str, namespace: str, lines: Iterable[str]) -> None:
    """Lines for `ip` or `tc` in a namespace, by one process; raises ToolError."""
    done = _run((tool, "-n", namespace, "-batch", "-"), "\n".join(lines))
    if done.returncode != 0:
        raise ToolError(f"{tool} -n {namespace}: {' '.join(done.stderr.split())}")


def _run(words: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    # in a session of its own, so that a second Ctrl-C does not end the removal of what there is
    return subprocess.run(words, input=text, capture_output=True, text=True, check=False, start_new_session=True)
