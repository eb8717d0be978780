"""Kills a host's workers when their launcher is gone, even after SIGKILL: `python reaper.py`, with a pipe as stdin.

The end of the pipe is the end of the launcher. Standard library only: it starts without the package. Its lines:

| line | meaning |
|---|---|
| `+GROUP`, `-GROUP` | a process group to watch over, or not any more; the workers' own children are in it |
| `=NAME=VALUE`, `!NAME=VALUE` | the same of all processes that have started with this in their environment |
| `~FOLDER` | a folder to be removed at the end |
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO

_ROUNDS, _BETWEEN = 20, 0.05
"""How often, and how many seconds apart, processes are looked for."""


class Reaper:
    """The process that outlives this one to kill what it leaves behind."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def watch_environment(self, variable: str) -> None:
        """Watches over all processes that start with `NAME=VALUE` in their environment."""
        self._tell(f"={variable}\n")

    def forget_environment(self, variable: str) -> None:
        self._tell(f"!{variable}\n")

    def remove_at_the_end(self, folder: str) -> None:
        self._tell(f"~{folder}\n")

    def close(self) -> None:
        """Kills what is still watched and ends."""
        pipe = self._pipe()
        with suppress(BrokenPipeError):
            pipe.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        pipe = self._pipe()
        with suppress(BrokenPipeError):  # somebody killed the reaper: the workers go on without it
            pipe.write(line.encode())
            pipe.flush()

    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin


def main() -> None:
    """Returns when the launcher is gone, its workers are killed and its folders removed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler may send it to every process of the job
    watched: dict[str, set[bytes]] = {"+": set(), "=": set(), "~": set()}
    ends = {"-": "+", "!": "="}
    while line := sys.stdin.buffer.readline():
        kind, what = line[:1].decode(), line[1:].rstrip(b"\n")
        if kind in ends:
            watched[ends[kind]].discard(what)
        else:
            watched[kind].add(what)
    for group in watched["+"]:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(group), signal.SIGKILL)
    for variable in watched["="]:
        _kill_those_with(variable)
    for folder in watched["~"]:
        shutil.rmtree(folder, ignore_errors=True)


def _kill_those_with(variable: bytes) -> None:
    """Kills all processes that have started with this in their environment, also those that they start meanwhile."""
    for _ in range(_ROUNDS):
        found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if variable in _environment(pid)]
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_BETWEEN)


def _environment(pid: int) -> list[bytes]:
    """Returns what a process has started with; nothing of one that is this process, has ended, or is another user's."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return [] if pid == os.getpid() else file.read().split(b"\0")
    except OSError:
        return []


if __name__ == "__main__":
    main()
