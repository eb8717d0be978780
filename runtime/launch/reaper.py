"""Kills a host's workers when their agent is gone, even after SIGKILL: `python reaper.py`, with a pipe as stdin.

Each line is `+GROUP` or `-GROUP`, a process group to watch over or not any more; the end of the pipe is the end of the
agent. Process groups take the workers' own children along, which a parent-death signal would not. Standard library
only: it starts without the package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import IO


class Reaper:
    """The process that outlives this one to kill what it leaves behind."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._tell(f"-{group}\n")

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
    """Returns when the agent is gone and its workers are killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler may send it to every process of the job
    groups: set[int] = set()
    while line := sys.stdin.buffer.readline():
        if line.startswith(b"+"):
            groups.add(int(line[1:]))
        else:
            groups.discard(int(line[1:]))
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
