"""A command that runs on a sandbox host, and the pipe by which the sandbox rules it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from heteromesh.runtime.sandbox.init import EVERYONE


class Process:
    """A command in a host's namespaces and control groups."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        host: str,
        namespace: str,
        hosts_file: str,
        groups: Sequence[Path],
        environment: Mapping[str, str],
        piped: bool,
    ) -> None:
        self.host = host
        theirs, self._control = os.pipe()
        passed = [theirs]
        try:
            for group in groups:
                passed.append(os.open(group / "cgroup.procs", os.O_WRONLY))
            words = [
                "ip",
                "netns",
                "exec",
                namespace,
                sys.executable,
                "-I",
                "-S",
                str(Path(__file__).with_name("init.py")),
            ]
            words += [str(theirs), ",".join(map(str, passed[1:])), host, hosts_file, *command]
            stream = subprocess.PIPE if piped else None
            self._popen = subprocess.Popen(
                words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                pass_fds=passed,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._control)
            raise
        finally:
            for descriptor in passed:
                os.close(descriptor)

    @property
    def streams(self) -> tuple[IO[bytes], IO[bytes]] | None:
        """Returns standard output and error, if they are piped."""
        out, err = self._popen.stdout, self._popen.stderr
        return (out, err) if out and err else None

    @property
    def pid(self) -> int:
        """Returns the outermost process's id, for waiting; signals go by `signal`."""
        return self._popen.pid

    def poll(self) -> int | None:
        """Returns the exit status, None while it runs; 128 + n when signal n ended it."""
        return self._popen.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status; raises subprocess.TimeoutExpired."""
        return self._popen.wait(timeout)

    def signal(self, number: int, everyone: bool = False) -> None:
        """Sends a signal to the command, or to every process that it started too."""
        if self._control >= 0:
            with suppress(BrokenPipeError):
                os.write(self._control, bytes([number | (EVERYONE if everyone else 0)]))

    def terminate(self) -> None:
        """Asks the command to end (SIGTERM)."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends every process at once and waits for it."""
        self.close()
        self._popen.wait()

    def close(self) -> None:
        """Lets go of the control pipe, which ends what still runs."""
        if self._control >= 0:
            os.close(self._control)
            self._control = -1
