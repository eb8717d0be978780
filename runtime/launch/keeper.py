"""Kills a host's workers when their agent is gone, even after SIGKILL: `python agent_keeper.py`, with a pipe as stdin.

Each line is `+GROUP` or `-GROUP`, a process group to watch over or not any more; the end of the pipe is the end of the
agent. Process groups take the workers' own children along, which a parent-death signal would not. Standard library
only: it starts without the package.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


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
