"""One job at a time writes a run directory: a lock that ends with the processes that hold it, however they end."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from heteromesh.errors import UserError

LOCK = ".lock"
_TRIES, _BETWEEN = 20, 0.05
"""How often, and how many seconds apart, a lock is asked for whose holder has not said yet whose it is."""


class RunLock:
    """Held from construction to `close`, or to the end of the process.

    Raises UserError where another job holds it, and OSError where the directory can't be written.
    """

    def __init__(self, path: Path, job: str = "") -> None:
        """`job`: what the processes of a job that may all get to write have in common; empty: this process alone."""
        self._file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(path, job or secrets.token_hex(8))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives it back. Again does nothing."""
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _take(self, path: Path, job: str) -> None:
        for _ in range(_TRIES):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._read()
                if holder.get("job") == job:
                    with suppress(BlockingIOError):
                        fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        return
                time.sleep(_BETWEEN)
            except OSError:
                return  # a file system without locks
            else:
                self._write({"job": job, "host": socket.gethostname(), "process": os.getpid()})
                fcntl.flock(self._file, fcntl.LOCK_SH)
                return
        holder = self._read()
        raise UserError(
            f"run directory {path} is written by another run (process {holder.get('process')} on host "
            f"{holder.get('host')}): wait until that ends, or choose another directory"
        )

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(os.pread(self._file, 4096, 0))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, values: dict[str, object]) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(values).encode(), 0)
