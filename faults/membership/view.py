"""What a member knows of the job in one epoch."""

from __future__ import annotations

from dataclasses import dataclass

from heteromesh.faults.wire.codec import WireError
from heteromesh.faults.wire.messages import FINISHED, LOST_STATE, JobStopped, NewEpoch


class Fenced(RuntimeError):
    """This member is out of the job for good: evicted, or cut off. It must not touch shared state any more."""


class Stopped(RuntimeError):
    """The job cannot go on (too few members, nobody holds the state); the message says what to do."""


class StateLost(Stopped):
    """No member holds the state any more: the job can begin again from a checkpoint, with whoever is started again."""


class Finished(Stopped):
    """The job was done before this member could take part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One epoch. The i-th member has rank i."""

    epoch: int
    members: tuple[int, ...]
    names: tuple[str, ...]
    addresses: tuple[tuple[tuple[str, int], ...], ...]
    stale: tuple[int, ...]
    """Members without the state after `committed` steps."""
    committed: int
    chain: str
    rank: int
    quorum_sets: tuple[tuple[int, ...], ...] = ()
    """Members of older epochs who have a say in an election (faults/membership/quorum.py)."""

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def source(self) -> int | None:
        """Returns the rank that hands the state to stale members: the lowest that holds it."""
        return next((rank for rank, member in enumerate(self.members) if member not in self.stale), None)

    def contributors(self, mask: int) -> tuple[int, ...]:
        """Returns the members whose bits are set."""
        return tuple(member for rank, member in enumerate(self.members) if mask >> rank & 1)


def stop_of(message: JobStopped) -> Stopped:
    """Returns what a member raises when the coordinator has said this."""
    kinds: dict[str, type[Stopped]] = {LOST_STATE: StateLost, FINISHED: Finished}
    return kinds.get(message.cause, Stopped)(message.reason)


def view_of(message: NewEpoch, member: int) -> View:
    """Returns the epoch as this member sees it. Raises WireError when it is not in it."""
    if member not in message.members or len(message.people) != len(message.members):
        raise WireError(f"epoch {message.epoch} is announced to member {member}, who is not in it")
    return View(
        epoch=message.epoch,
        members=message.members,
        names=tuple(person.name for person in message.people),
        addresses=tuple(person.addresses for person in message.people),
        stale=message.stale,
        committed=message.committed,
        chain=message.chain,
        rank=message.members.index(member),
        quorum_sets=message.quorum_sets,
    )
