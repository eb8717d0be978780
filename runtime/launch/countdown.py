"""Fewer ranks than the job needs: how long the others wait for them, said every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from heteromesh.faults.coordinator.server import Coordinator

_EVERY = 10.0
Say = Callable[[str], None]


class _Wait:
    """Something that is waited for, and how long."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._due = 0.0

    def reset(self) -> None:
        """Stops waiting."""
        self._since = None

    def seconds(self, now: float) -> float:
        """Returns the seconds since the first call after `reset`."""
        if self._since is None:
            self._since = self._due = now
        return now - self._since

    def tell(self, now: float, text: str, left: float, say: Say) -> None:
        """Says it every ten seconds."""
        if now >= self._due and left > 0:
            self._due = now + _EVERY
            say(f"{text}, waiting {left:.0f} s more")


class Countdown:
    """Looks whether a coordinator's job has enough members. Ends a job that can't start; one that has started and
    lost too many is ended by the coordinator itself (`Timing.patience`)."""

    def __init__(self, coordinator: Coordinator, patience: float, say: Say) -> None:
        """`patience`: seconds that too few members wait for the others at the start."""
        self._coordinator, self._patience, self._say = coordinator, patience, say
        self._wait = _Wait()
        self._spares = 0

    def look(self, now: float, coming: Collection[str]) -> str:
        """Returns the reason why the job can't start, or nothing. `coming`: names of members that this host runs."""
        membership = self._coordinator.membership
        here = [person.name for person in list(membership.people.values())]
        least, running = membership.bounds.min, len(membership.world.members)
        have = running or len(here)
        self._tell_spares(len(here) - membership.bounds.max)
        # a worker that still loads its data is no missing one
        if have >= least or not here or not (running or set(coming) <= set(here)):
            self._wait.reset()
            return ""
        left = self._patience - self._wait.seconds(now)
        if running:
            left = self._coordinator.short_seconds or 0.0
        ranks = f"{have} of at least {least} ranks {'are' if have > 1 else 'is'} {'left' if running else 'here'}"
        self._wait.tell(now, ranks, left, self._say)
        if running or left > 0:
            return ""
        return f"only {have} of at least {least} ranks came within {self._patience:g} s: start the others in that time"

    def _tell_spares(self, spares: int) -> None:
        if spares > self._spares:
            most = self._coordinator.membership.bounds.max
            self._say(f"the job takes {most} ranks, and {spares} more wait until one of them is lost")
        self._spares = max(0, spares)


def wait_until(wrong: Callable[[], str], seconds: float, what: str, say: Say) -> str:
    """Returns nothing once `wrong()` does, asked twice a second; its last answer after that many seconds."""
    wait = _Wait()
    while reason := wrong():
        now = time.monotonic()
        left = seconds - wait.seconds(now)
        if left <= 0:
            return reason
        wait.tell(now, what, left, say)
        time.sleep(0.5)
    return ""
