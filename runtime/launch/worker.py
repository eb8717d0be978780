"""One worker of a host: a process group, started again some times, and the reason of each end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heteromesh.runtime.launch.reaper import Reaper
from heteromesh.runtime.process.failure import ERROR_FILE, RESTARTS, UNDER_HETEROMESH_RUN

_WIDTH = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitStatus:
    """How a process ended."""

    code: int
    """Exit code; -n: signal n."""
    kind: str = ""
    """Name of the exception's type, where one was written down."""
    message: str = ""

    @property
    def reason(self) -> str:
        """Says what follows the worker's name in a sentence."""
        if self.code < 0:
            try:
                return f"was killed by {signal.Signals(-self.code).name}"
            except ValueError:
                return f"was killed by signal {-self.code}"
        first = f"{self.kind}: {self.message}".partition("\n")[0][:_WIDTH] if self.kind else ""
        return f"ended with exit code {self.code}" + (f" ({first})" if first else "")


class WorkerProcess:
    """Holds one local rank of the host. Its processes lead process groups of their own, so that a terminal's Ctrl-C
    reaches them once, by the agent."""

    def __init__(self, rank: int, name: str, folder: Path, reaper: Reaper) -> None:
        self.rank, self.name = rank, name
        """`name`: the member's, as the coordinator knows it."""
        self.starts = 0
        self.lost = False
        """Whether one of its processes died while the others went on."""
        self.due: float | None = 0.0
        """When the process is to be started (again), on the monotonic clock; None: not at all."""
        self.exit_status: ExitStatus | None = None
        """Of the last process; None before and while it runs."""
        self._folder, self._reaper = folder, reaper
        self._process: subprocess.Popen[bytes] | None = None
        self._handle = -1

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def open(self) -> bool:
        """Whether it runs or will."""
        return self.running or self.due is not None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else -1

    def fileno(self) -> int:
        """Returns a descriptor that is readable when the process has ended."""
        return self._handle

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Raises OSError when the command cannot be started."""
        self.due, self.exit_status = None, None
        self._error_file().unlink(missing_ok=True)
        own = {ERROR_FILE: str(self._error_file()), RESTARTS: str(self.starts), UNDER_HETEROMESH_RUN: "1"}
        self._process = subprocess.Popen(command, env={**environment, **own}, start_new_session=True)
        self._reaper.watch(self._process.pid)
        self._handle = os.pidfd_open(self._process.pid)
        self.starts += 1

    def signal(self, number: int) -> None:
        """Signals the process alone, which ends its children; nothing when it has ended."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kills the process and its children (SIGKILL)."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> ExitStatus:
        """Waits for the end of the process and kills what it leaves behind."""
        assert self._process is not None
        # not reaped before its group is gone: until then nobody else gets its number
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
        self._reaper.forget(self._process.pid)
        code = self._process.wait()
        os.close(self._handle)
        self._process, self._handle = None, -1
        kind, message = read_error(self._error_file())
        self.exit_status = ExitStatus(code=code, kind=kind, message=message)
        return self.exit_status

    def _error_file(self) -> Path:
        return self._folder / f"{self.rank}.json"


def read_error(file: Path) -> tuple[str, str]:
    """Returns (type's name, message) of the exception that a process wrote down; empty: none."""
    try:
        kind, _, message = error_text(json.loads(file.read_text())).partition(": ")
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""
    return kind, message


def error_text(written: Mapping[str, Any]) -> str:
    """Returns `type: message` from what torch's error handler has written."""
    told = written["message"]
    return str(told["message"]) if isinstance(told, dict) else str(told)
