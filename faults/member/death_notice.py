"""Notice of a death that does not depend on the dead process's memory.

Linux frees a process's memory before it closes its connections, about 40 ms for each GB; a robust mutex that the main
thread holds in shared memory is released before that (set_robust_list(2), pthread_mutexattr_setrobust(3)). Members of
one host watch each other in a ring.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable

_SHARED = 1
_ROBUST = 1
_SIZE = 4096
_ROUND = 0.2
"""Seconds after which a watcher looks whether it is still wanted."""
_POLL = 0.002


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=False)


class Lease:
    """This process's mutex, held by the thread that made it (the main thread) until the process ends."""

    def __init__(self) -> None:
        fd = os.memfd_create("heteromesh-lease", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        self._fd, self._memory = fd, mmap.mmap(fd, _SIZE)
        self._mutex = (ctypes.c_char * 64).from_buffer(self._memory)
        library, attributes = _library(), (ctypes.c_char * 64)()
        library.pthread_mutexattr_init(attributes)
        library.pthread_mutexattr_setpshared(attributes, _SHARED)
        library.pthread_mutexattr_setrobust(attributes, _ROBUST)
        if library.pthread_mutex_init(self._mutex, attributes) or library.pthread_mutex_lock(self._mutex):
            raise OSError("this system has no robust process-shared mutexes")
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        """Where processes of the same host and user find it."""

    def close(self) -> None:
        """Gives up the lease; watchers learn it as a death. In another thread than its maker's: when that one ends."""
        os.close(self._fd)
        if _library().pthread_mutex_unlock(self._mutex):
            # it stays in its owner's list of robust mutexes, which is walked at every lock: its memory must stay mapped
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._mutex))
            return
        del self._mutex
        self._memory.close()


def host_id() -> str:
    """Returns one value for all that can watch each other: this boot of this machine, this process namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Watcher:
    """Waits in a thread of its own for the end of the process that holds a lease, and calls `dead` then, once."""

    def __init__(self, path: str, dead: Callable[[], None]) -> None:
        """Raises OSError when the lease cannot be opened (the process has gone, or is of another user)."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._dead, self._unwanted = dead, threading.Event()
        self._thread = threading.Thread(target=self._run, name="heteromesh-notice", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the interest in a death; the thread ends a little later."""
        self._unwanted.set()

    def join(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        mutex = (ctypes.c_char * 64).from_buffer(self._memory)
        while not self._unwanted.is_set():
            result = _lock(mutex, _ROUND)
            if result == errno.ETIMEDOUT:
                continue
            if result in (0, errno.EOWNERDEAD):
                # not made consistent: the other watchers get ENOTRECOVERABLE, which tells them the same
                _library().pthread_mutex_unlock(mutex)
            if not self._unwanted.is_set():
                self._dead()
            break
        del mutex
        self._memory.close()


def _lock(mutex: ctypes.Array[ctypes.c_char], seconds: float) -> int:
    """Returns what pthread_mutex_lock returns, or ETIMEDOUT. The system's time may jump meanwhile."""
    library = _library()
    if hasattr(library, "pthread_mutex_clocklock"):
        until = time.monotonic() + seconds
        limit = _Timespec(int(until), int(until % 1 * 1e9))
        return int(library.pthread_mutex_clocklock(mutex, time.CLOCK_MONOTONIC, ctypes.byref(limit)))
    # before glibc 2.30 there is no wait by this clock
    for _ in range(int(seconds / _POLL)):
        result = int(library.pthread_mutex_trylock(mutex))
        if result != errno.EBUSY:
            return result
        time.sleep(_POLL)
    return errno.ETIMEDOUT
