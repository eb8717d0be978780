"""The session of a job whose members come and go: attempts are made in epochs, repeated and committed by a vote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TypeVar

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.records import Recorder
from heteromesh.comm.session import Attempt, Committed
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.group import EpochGroup
from heteromesh.faults.member.member import Member
from heteromesh.faults.member.world import EpochWorld
from heteromesh.faults.membership.view import StateLost
from heteromesh.planner.ownership.ownership import LostState

T = TypeVar("T")
_TICK_SECONDS = 0.1


class Elastic:
    """A `Session` over a member of a job, which it closes. All methods raise Fenced and Stopped.

    An attempt that a loss interrupts is made again in the next epoch, by whoever is left, in another world. One that
    raises LostState, because nobody left has a part of the state, raises StateLost on all members.
    """

    def __init__(
        self,
        member: Member,
        capture: Callable[[], Any],
        adopt: Callable[[Any], None],
        *,
        step: int = 0,
        collectives: Callable[[EpochWorld], Collectives] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`capture()` gives all that a joining member must have, `adopt(state)` makes it this member's.

        `step`: commits behind the present state. `collectives` makes an epoch's collectives when they are first used.
        """
        self.member = member
        self._steps = Steps(member.group(), capture, adopt, step=step)
        self._open, self._recorder = collectives, recorder or Recorder()
        self._world: EpochWorld | None = None
        self._committed_in = -1
        """The epoch of this member's last commit."""
        self.finished = False
        """Whether all that the job was to do is done; told to whoever joins afterwards."""

    def start(self) -> EpochWorld:
        """Returns when this member takes part and has the job's state."""
        self._steps.start()
        return self._world_of(self.member.group())

    def commit(
        self, attempt: Callable[[World], Attempt[T]], overlap: Callable[[T], None] | None = None
    ) -> Committed[T]:
        """Runs `attempt` in one epoch after the other until all members of one have the same digest of it."""

        def body(group: EpochGroup) -> tuple[tuple[T, EpochWorld], str]:
            world = self._world_of(group)
            try:
                # transports tell nobody of their failures, the group does
                made = group.run(lambda _: attempt(world))
            except GroupAborted:
                self._end_epoch()
                raise
            except LostState as error:
                # all are to hear of the first cause, not of who then gives up
                group.end_job(str(error))
                raise StateLost(str(error)) from None
            return (made.result, world), made.digest

        done = self._steps.atomic(body, None if overlap is None else lambda made: overlap(made[0]))
        result, world = done.result
        self._committed_in = world.epoch
        return Committed(
            result=result, world=world, digest=done.digest, attempts=done.attempts, number=self._steps.step
        )

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Lets the coordinator hear inside that this thread is alive although it shows no progress."""
        ended = Event()

        def tick() -> None:
            while not ended.wait(_TICK_SECONDS):
                self.member.tick()

        thread = Thread(target=tick, name="heteromesh-tick", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def close(self) -> None:
        """Leaves the epoch and the job; in the thread that made the member."""
        self.member.group().close()
        self._end_epoch()
        self.member.close(finished=self.finished)

    def _world_of(self, group: EpochGroup) -> EpochWorld:
        """Returns the epoch's world: the same one as long as the epoch lasts."""
        if self._world is None or self._world.epoch != group.view.epoch:
            self._end_epoch()
            self._world = EpochWorld(group, self._recorder, collectives=self._open)
        # equal on all members: a joiner makes an epoch of its own, and the chain of commits is the job's
        self._world.fresh = self._committed_in == self._world.epoch or not group.committed()[1]
        return self._world

    def _end_epoch(self) -> None:
        """Closes what the last epoch's world has opened; the group has left that epoch, so nothing waits there."""
        world, self._world = self._world, None
        if world is not None:
            world.close()
