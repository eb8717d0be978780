"""Members of one host watch each other's leases in a ring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from heteromesh.faults.member.death_notice import Lease, Watcher, host_id
from heteromesh.faults.wire.messages import JoinInfo


class HostPeers:
    """This process's lease and its watch over the next member of the same host."""

    def __init__(self, dead: Callable[[int], None]) -> None:
        """`dead(member)` is called in a watcher's thread."""
        self._dead = dead
        self._lock = threading.Lock()
        self._watcher: Watcher | None = None
        self._watched = ""
        self._old: list[Watcher] = []
        self._lease: Lease | None = None
        self.host = host_id()
        if self.host:
            try:
                self._lease = Lease()
            except OSError:
                self.host = ""  # no notice then; a death shows when the connection ends
        self.path = self._lease.path if self._lease is not None else ""

    def watch(self, me: int, members: Sequence[int], people: Sequence[JoinInfo]) -> None:
        """Watches, in a new epoch, the next member on this host instead of the one before."""
        if not self.host:
            return
        here = [(m, p.death_notice) for m, p in zip(members, people, strict=True) if p.host == self.host]
        index = next((i for i, (m, _) in enumerate(here) if m == me), None)
        member, path = (me, "") if index is None or len(here) == 1 else here[(index + 1) % len(here)]
        with self._lock:
            if path == self._watched:
                return
            if self._watcher is not None:
                self._watcher.stop()
                self._old = [w for w in [*self._old, self._watcher] if w.running]
            self._watcher, self._watched = None, path
            if path:
                try:
                    self._watcher = Watcher(path, lambda: self._dead(member))
                except OSError:
                    self._dead(member)

    def close(self) -> None:
        """Ends the watch and gives the lease back; in the thread that made this."""
        with self._lock:
            watchers, self._old = [*self._old, *([self._watcher] if self._watcher else [])], []
        for watcher in watchers:
            watcher.stop()
            watcher.join()
        if self._lease is not None:
            self._lease.close()
