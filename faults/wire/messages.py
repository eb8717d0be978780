"""The control messages between members and their coordinator, and what they are made of.

faults/wire/codec.py puts them on the wire: a message as an object with its kind, a value inside of it as a list of its
fields in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from heteromesh.comm.tcp.info import TcpInfo
from heteromesh.faults.wire.bounds import Bounds
from heteromesh.faults.wire.deadlines import Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinInfo:
    """What a process says of itself when it joins. Raises ValueError without an address."""

    name: str = ""
    addresses: tuple[tuple[str, int], ...]
    """Where its data plane listens."""
    facts: Mapping[str, str]
    """What must be equal in the whole job: version, model, plan, ..."""
    step: int = 0
    """Steps that its state has behind it."""
    state: str = ""
    """Digest of its state; members that start with the step and digest of the first are not healed."""
    death_notice: str = ""
    """Where processes of the same host can watch its life (faults/member/death_notice.py)."""
    host: str = ""
    elects: bool = False
    """Whether it would elect another coordinator if it lost this one."""
    place: int | None = None
    """Which rank of the whole job it is, where that is known: members have ranks in this order."""

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ValueError("a process without an address")


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What a member knows of the job's epochs when it looks for another coordinator."""

    epoch: int
    """The newest epoch that it has told its coordinator to know of; the first one if it came to none."""
    committed: int
    chain: str
    stale: bool
    """Whether it lacks the state after `committed` steps."""
    members: tuple[int, ...]
    known: int
    """The newest epoch that it has heard of."""
    quorum_sets: tuple[tuple[int, ...], ...] = ()
    """Members of older epochs who have a say too (faults/membership/quorum.py)."""
    addresses: tuple[tuple[tuple[str, int], ...], ...] = ()
    """Where the members listen, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkUse:
    """What one member knows of its traffic with another one; seconds and bytes since the epoch began."""

    waited: float = 0.0
    """Blocked on what the other must send."""
    late: float = 0.0
    """Of that, while none of its bytes were arriving."""
    pushed: float = 0.0
    """Blocked on what the other must take."""
    flow: float = 0.0
    """While its bytes were arriving."""
    received: int = 0
    sent: int = 0
    tcp: TcpInfo = field(default_factory=TcpInfo)


# what a member says


@dataclass(frozen=True, slots=True)
class Join:
    """A process wants to be a member. Answered with Welcome or Refused."""

    info: JoinInfo


@dataclass(frozen=True, slots=True)
class Rejoin:
    """A member has lost its coordinator and votes for this one. Answered with Welcome or Refused."""

    member: int
    report: EpochReport
    info: JoinInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """A sign of life."""

    tick: int | None = None
    """Grows while the main thread gets on or bytes move."""
    epoch: int | None = None
    """The newest one that is known to the member."""
    waiting: tuple[int, ...] = ()
    """Members whose bytes it waits for."""
    waiting_in: int = -1
    """The epoch in which it waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """A member has the result of a step, not applied yet."""

    epoch: int
    step: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Healed:
    """A member has received the state after so many steps."""

    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFailed:
    """A connection of this epoch failed, as far as known that with this peer (an id)."""

    epoch: int
    peer: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class MemberDied:
    """A process of the same host is dead."""

    member: int


@dataclass(frozen=True, slots=True)
class Leave:
    """The member leaves in order."""

    finished: bool = False
    """Whether all that the job was to do is done."""


@dataclass(frozen=True, slots=True)
class EndJob:
    """A part of the state is lost, which only the members can see."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationReport:
    """What one member does in one epoch: counters that only grow, so that a lost report costs nothing."""

    epoch: int
    name: str
    """The collective that it is in, or was in last; empty before the first."""
    entered: int
    """Collectives it has entered in this epoch."""
    finished: int
    age: float
    """Seconds since the epoch's connections were made."""
    inside: float
    """Seconds in collectives that it has left."""
    since: float
    """Seconds since it entered the collective, or left the last one."""
    planned: float = 0.0
    """Seconds of work that plans have foreseen for it; 0 where nobody plans."""
    waiting: tuple[int, ...] = ()
    """Members whose bytes, either way, it waits for now."""
    links: Mapping[int, LinkUse]
    """By the other member."""

    @property
    def within(self) -> bool:
        """Whether it is in a collective."""
        return self.entered > self.finished

    @property
    def blocked(self) -> float:
        """Seconds in which it could do nothing."""
        return sum(link.waited + link.pushed for link in self.links.values())


# what the coordinator says


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """The process is a member."""

    member: int
    bounds: Bounds
    timing: Timing


@dataclass(frozen=True, slots=True)
class Refused:
    """The process is no member."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEpoch:
    """An epoch begins: the i-th member has rank i."""

    epoch: int
    members: tuple[int, ...]
    stale: tuple[int, ...]
    """Those that need the state before they can take part."""
    committed: int
    """Steps that are committed."""
    chain: str
    quorum_sets: tuple[tuple[int, ...], ...] = ()
    people: tuple[JoinInfo, ...] = ()
    """The members as they have introduced themselves, without facts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitNotice:
    """Every member of the epoch has the same result of a step."""

    epoch: int
    committed: int
    chain: str


@dataclass(frozen=True, slots=True)
class TooFew:
    """The epoch is over and the next one waits for more members."""

    have: int
    need: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """The member is out of the job for good."""

    reason: str


@dataclass(frozen=True, slots=True)
class JobStopped:
    """The job is over."""

    reason: str
    cause: str = ""
    """LOST_STATE, FINISHED, or nothing that the members have to tell apart."""


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life of the coordinator."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a received message of a kind that does not exist, or without the fields of its kind. Never sent."""

    kind: str


LOST_STATE, FINISHED = "lost state", "finished"
"""Causes of `JobStopped`: nobody holds the state any more, so that the job can begin again from a checkpoint; or all
that was to be done is done, so that nothing must."""
FromMember = Join | Rejoin | Heartbeat | Vote | Healed | LinkFailed | MemberDied | Leave | EndJob | OperationReport
FromCoordinator = Welcome | Refused | NewEpoch | CommitNotice | TooFew | Evicted | JobStopped | Alive
ControlMessage = FromMember | FromCoordinator | Malformed
