"""What a member knows of a group in one epoch."""

from __future__ import annotations

from dataclasses import dataclass

from heteromesh.faults.wire.messages import Message, WireError


class Fenced(RuntimeError):
    """This member is out of the job for good: evicted, or cut off. It must not touch shared state any more."""


class Stopped(RuntimeError):
    """The job cannot go on (too few members, nobody holds the state); the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One epoch of one group. The i-th member has rank i."""

    group: str
    epoch: int
    members: tuple[int, ...]
    names: tuple[str, ...]
    addresses: tuple[tuple[tuple[str, int], ...], ...]
    stale: tuple[int, ...]
    """Members without the state after `committed` steps."""
    committed: int
    chain: str
    rank: int
    bases: tuple[tuple[int, ...], ...] = ()
    """Members of older epochs who have a say in an election (faults/membership/quorum.py)."""

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def source(self) -> int | None:
        """The rank that hands the state to stale members: the lowest that holds it."""
        return next((rank for rank, member in enumerate(self.members) if member not in self.stale), None)

    def contributors(self, mask: int) -> tuple[int, ...]:
        """The members whose bits are set."""
        return tuple(member for rank, member in enumerate(self.members) if mask >> rank & 1)


def view_of(message: Message, member: int) -> View:
    """From a config message. Raises WireError when it is malformed."""
    try:
        members = tuple(message["members"])
        return View(
            group=message["group"],
            epoch=message["epoch"],
            members=members,
            names=tuple(person["name"] for person in message["people"]),
            addresses=tuple(tuple((h, p) for h, p in person["addresses"]) for person in message["people"]),
            stale=tuple(message["stale"]),
            committed=message["committed"],
            chain=message["chain"],
            rank=members.index(member),
            bases=tuple(tuple(base) for base in message["bases"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a config message that is malformed: {error}") from None
