"""First process of a sandbox host: `ip netns exec NAMESPACE python init.py CONTROL CGROUPS HOSTNAME HOSTS COMMAND...`.

It runs COMMAND in a process namespace of its own, whose end is the end of every process in it. CONTROL is a pipe from
the sandbox: a byte is a signal for COMMAND, or with EVERYONE set for all its processes too; its end, which comes even
when the sandbox is killed by SIGKILL, ends the host. CGROUPS are open `cgroup.procs`, with commas, HOSTS the text of
/etc/hosts. Standard library only: it starts in 30 ms without the package.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from contextlib import suppress

EVERYONE = 0x80
KILLED = 128 + signal.SIGKILL
_NEW_UTS, _NEW_IPC, _NEW_PID = 0x04000000, 0x08000000, 0x20000000
_BIND = 4096
_PARENT_DEATH_SIGNAL = 1


def main(argv: list[str]) -> int:
    """Returns the exit status of the command; 128 + n when signal n ended it."""
    control, cgroups, hostname, hosts, *command = argv
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_UTS | _NEW_IPC | _NEW_PID), "unshare")
    socket.sethostname(hostname)
    first = os.fork()
    if first == 0:
        try:
            status = _first(libc, int(control), [int(n) for n in cgroups.split(",") if n], hosts, command)
        except OSError as error:
            print(f"heteromesh sandbox: {error}", file=sys.stderr, flush=True)
            status = 126
        os._exit(status)
    os.close(int(control))
    return _status(os.waitpid(first, 0)[1])


def _first(libc: ctypes.CDLL, control: int, cgroups: list[int], hosts: str, command: list[str]) -> int:
    libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    _check(libc.mount(b"proc", b"/proc", b"proc", 0, None), "mount /proc")
    # hosts share no memory
    _check(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None), "mount /dev/shm")
    with open("/dev/shm/hosts", "w") as file:
        file.write(hosts)
    _check(libc.mount(b"/dev/shm/hosts", b"/etc/hosts", None, _BIND, None), "mount /etc/hosts")
    os.unlink("/dev/shm/hosts")
    child = os.fork()
    if child == 0:
        _execute(control, cgroups, command)
    threading.Thread(target=_obey, args=(control, child), daemon=True).start()
    while True:
        process, status = os.wait()
        if process == child:
            return _status(status)


def _execute(control: int, cgroups: list[int], command: list[str]) -> None:
    try:
        os.close(control)
        os.setsid()
        for cgroup in cgroups:
            os.write(cgroup, b"0")
            os.close(cgroup)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"heteromesh sandbox: can't start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127)


def _obey(control: int, child: int) -> None:
    while word := os.read(control, 1):
        with suppress(ProcessLookupError):
            os.kill(-1 if word[0] & EVERYONE else child, word[0] & ~EVERYONE)
    os._exit(KILLED)


def _status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
