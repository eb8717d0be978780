"""Makes this process as slow as an older device: it is stopped for a share of every few milliseconds. Needs no root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

PERIOD = 0.02
"""Seconds: short beside a pass, long beside the system's own time slices."""


def pace(speed: float) -> None:
    """Lets this process run for the share `speed` of the time, 0 < speed <= 1, until it ends.

    A child does it (POSIX); it ends with this process, also when that is killed.
    """
    if speed < 1:
        subprocess.Popen([sys.executable, __file__, str(os.getpid()), str(speed)], stdin=subprocess.DEVNULL)


def _stop_and_go(process: int, speed: float) -> None:
    # Ctrl-C is for the paced process, whose end is this one's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ProcessLookupError):
        try:
            while os.getppid() == process:
                os.kill(process, signal.SIGSTOP)
                time.sleep(PERIOD * (1 - speed))
                os.kill(process, signal.SIGCONT)
                time.sleep(PERIOD * speed)
        finally:
            os.kill(process, signal.SIGCONT)


if __name__ == "__main__":
    _stop_and_go(int(sys.argv[1]), float(sys.argv[2]))
