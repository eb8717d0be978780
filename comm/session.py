"""How results of a step become everybody's: an attempt is made, and committed by all ranks or by none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from heteromesh.comm.world import World

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """What one attempt gave on this rank."""

    result: T
    digest: str
    """Equal on all ranks exactly if their results are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed(Generic[T]):
    """An attempt whose result every rank has."""

    result: T
    world: World
    """The one in which it was made; it may have ended since."""
    digest: str
    attempts: int
    """1, and one more for each epoch that ended under it."""
    number: int
    """Commits behind the state, this one included."""


class Session(Protocol):
    """One rank's commits, made by one thread."""

    def start(self) -> World:
        """Returns when this rank takes part; one that joins a running job has adopted the job's state."""

    def commit(
        self, attempt: Callable[[World], Attempt[T]], overlap: Callable[[T], None] | None = None
    ) -> Committed[T]:
        """Runs `attempt` until every rank has made it in one world.

        The attempt may communicate in the world that it is given, leaves its inputs as they are, and is made again
        when a rank is lost meanwhile. `overlap(result)` runs while the ranks agree: work that can be done again.
        """

    def busy(self) -> AbstractContextManager[None]:
        """Says inside that this thread is at something long which shows no progress, and that this is right."""

    def close(self) -> None:
        """Leaves the job in order."""


class Fixed:
    """The session of a world that never changes: every attempt is made once."""

    def __init__(self, world: World) -> None:
        self._world, self._number = world, 0

    def start(self) -> World:
        return self._world

    def commit(
        self, attempt: Callable[[World], Attempt[T]], overlap: Callable[[T], None] | None = None
    ) -> Committed[T]:
        """Runs the attempt, then `overlap` on its result."""
        done = attempt(self._world)
        if overlap is not None:
            overlap(done.result)
        self._number += 1
        return Committed(result=done.result, world=self._world, digest=done.digest, attempts=1, number=self._number)

    def busy(self) -> AbstractContextManager[None]:
        """Does nothing: nobody watches this thread."""
        return nullcontext()

    def close(self) -> None:
        """Does nothing: whoever opened the world closes it."""
