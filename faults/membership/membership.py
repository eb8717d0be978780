"""Who is in the job: joins and refusals, deaths, groups and their epochs. Messages in, messages out; no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.membership.quorum import holds
from heteromesh.faults.wire.messages import Message

WORLD = "world"
Order = tuple[int, Message]
"""(member, message to it)."""
_REBUILDS = 3
"""Epochs without commit after which a member that failed connections or digests name is evicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How many members a job may have. Members beyond the maximum wait as spares."""

    least: int = 1
    most: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 256:
            raise ValueError(f"members must be bounded by 1 <= MIN <= MAX <= 256, got {self.least}:{self.most}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Applicant:
    """What a process says of itself when it joins."""

    name: str
    addresses: tuple[tuple[str, int], ...]
    """Where its data plane listens."""
    facts: dict[str, str]
    """What must be equal in the whole job: version, model, plan, ..."""
    step: int = 0
    """Steps that its state has behind it."""
    state: str = ""
    """Digest of its state; members that start with the step and digest of the first are not healed."""
    notice: str = ""
    """Where processes of the same host can watch its life (faults/member/death_notice.py)."""
    host: str = ""
    elects: bool = False
    """Whether it would elect another coordinator if it lost this one."""

    @classmethod
    def read(cls, message: Message) -> Applicant | None:
        """From a join message; None when it is malformed."""
        try:
            addresses = tuple((str(host), int(port)) for host, port in message["addresses"])
            facts = {str(k): str(v) for k, v in message["facts"].items()}
            texts = {key: str(message.get(key, "")) for key in ("name", "state", "notice", "host")}
            step, elects = int(message.get("step", 0)), message.get("elects") is True
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return cls(addresses=addresses, facts=facts, step=step, elects=elects, **texts) if addresses else None


Why = Literal["left", "died", "silent", "stuck", "unreachable", "diverged", "slow"]


@dataclass(slots=True)
class Membership:
    """The coordinator's state. Every method returns the messages that follow from what it was told."""

    bounds: Bounds = field(default_factory=Bounds)
    facts: dict[str, str] = field(default_factory=dict)
    people: dict[int, Applicant] = field(default_factory=dict)
    """Everyone whose connection stands, spares included."""
    groups: dict[str, Epochs] = field(default_factory=lambda: {WORLD: Epochs(WORLD)})
    counts: Counter[str] = field(default_factory=Counter)
    last: int = 0
    """The highest id given so far; ids are never used again."""
    started: bool = False
    electing: bool = False
    """No epoch begins before a majority of the last one's members has reported (faults/coordinator/election.py)."""
    elective: bool = False
    """Whether members would elect another coordinator if they lost this one."""
    bases: list[list[int]] = field(default_factory=list)
    """The world epochs' members of whom those who go on must be a quorum (faults/membership/quorum.py)."""
    _known: dict[int, int] = field(default_factory=dict)
    """The newest world epoch that each member has said that it knows of, the lost ones too."""
    _open: list[tuple[int, list[int]]] = field(default_factory=list)
    """World epochs that were announced and that not all of their members have said to know of, and those members."""
    _declared: dict[str, dict[int, list[int]]] = field(default_factory=dict)

    @property
    def world(self) -> Epochs:
        return self.groups[WORLD]

    @property
    def waiting(self) -> list[int]:
        """Those who are not in the world group, in order of arrival."""
        return [m for m in self.people if m not in self.world.members]

    def join(self, applicant: Applicant) -> int | str:
        """The new member's id, or the reason of the refusal. `admit` decides when it takes part."""
        if not self.facts:
            self.facts = dict(applicant.facts)
        differing = [k for k in {**self.facts, **applicant.facts} if self.facts.get(k) != applicant.facts.get(k)]
        if differing:
            self.counts["refused"] += 1
            told = "; ".join(
                f"{k} is {applicant.facts.get(k, 'missing')}, the job's is {self.facts.get(k, 'missing')}"
                for k in sorted(differing)
            )
            return f"this process does not belong to the job: {told}"
        self.elective = self.elective or applicant.elects
        self.last += 1
        self.people[self.last] = applicant
        self.counts["joined"] += 1
        return self.last

    def admit(self) -> list[Order]:
        """Starts the job, or an epoch with the waiting members when nobody is in the middle of a step."""
        room = self.bounds.most - len(self.world.members)
        ready = self.waiting[: max(room, 0)]
        if not ready or self.electing or self.outvoted():
            return []
        if not self.world.members:
            return self._start(ready) if len(ready) >= self.bounds.least else []
        short = len(self.world.members) < self.bounds.least
        return self._grow(ready) if short and len(self.world.members) + len(ready) >= self.bounds.least else []

    def _start(self, ready: list[int]) -> list[Order]:
        self.started = True
        self.world.chain = ""
        newest = max(self.people[m].step for m in ready)
        source = next(m for m in ready if self.people[m].step == newest)
        like = (newest, self.people[source].state)
        self.world.committed = newest
        self.world.current = {m for m in ready if (self.people[m].step, self.people[m].state) == like}
        self.world.change(ready)
        self.world.losses = 0
        self.bases, self._open = [list(ready)], []
        return self._announce(self.world)

    def knows(self, member: int, epoch: object) -> None:
        """A member has heard of a world epoch; when all of it have, those of older ones have no say any more.

        What a member has said counts after its loss too: it cannot elect another coordinator without that epoch's
        quorum.
        """
        if not isinstance(epoch, int) or member not in self.people:
            return
        self._known[member] = max(epoch, self._known.get(member, -1))
        for index in reversed(range(len(self._open))):
            number, members = self._open[index]
            if all(self._known.get(m, -1) >= number for m in members):
                self.bases = self._bases_from(index)
                del self._open[: index + 1]
                self._known = {m: e for m, e in self._known.items() if m in self.people or self._awaits(m)}
                return

    def _bases_from(self, index: int) -> list[list[int]]:
        """Who has a say once this open epoch is known to all of it: newer ones too, into which others may have come."""
        return [list(members) for _, members in self._open[index:]]

    def _awaits(self, member: int) -> bool:
        return any(member in members for _, members in self._open)

    def outvoted(self) -> str | None:
        """A sentence when the members that were lost may have elected another coordinator."""
        if not self.elective or not self.started or self.electing or holds(self.people, self.bases):
            return None
        left = [m for m in self.world.members if m in self.people]
        return (
            f"members {left} are not the larger part of {self.bases[0]}, who were in the job before: the others may go "
            "on with a coordinator of their own; start again from the last checkpoint if they do not"
        )

    def hopeful(self) -> bool:
        """Whether those who are left may still say that they know of an epoch in which they are a quorum.

        Only of epochs that were announced before the loss that outvoted them, so that a lost one was in them.
        """
        for index, (number, members) in enumerate(self._open):
            lost = [m for m in members if m not in self.people]
            told = all(self._known.get(m, -1) >= number for m in lost)
            if lost and told and holds(self.people, self._bases_from(index)):
                return True
        return False

    def _grow(self, ready: list[int]) -> list[Order]:
        self.world.change([*self.world.members, *ready])
        self.world.losses = 0
        return self._announce(self.world)

    def finish(self, member: int, message: Message) -> list[Order]:
        """A member has a step's result. When it was the last: commit, and the epoch with those who wait."""
        group = self.groups.get(str(message.get("group")))
        if group is None:
            return []
        if group is self.world:
            self.knows(member, message.get("epoch"))
        if not group.finish(member, _number(message, "epoch"), _number(message, "step"), str(message.get("digest"))):
            return []
        if not group.agreed():
            return self._diverged(group)
        self.counts["commits"] += 1
        told = group.commit()
        orders = [(m, told) for m in group.members]
        room = self.bounds.most - len(group.members)
        if group is self.world and self.waiting and room > 0:
            orders += self._grow(self.waiting[:room])
        return orders

    def _diverged(self, group: Epochs) -> list[Order]:
        self.counts["divergences"] += 1
        minority = group.minority()
        if group.losses >= _REBUILDS:
            return [order for m in minority for order in self.lose(m, "diverged")]
        return self._rebuild(group)

    def healed(self, member: int, message: Message) -> list[Order]:
        group = self.groups.get(str(message.get("group")))
        if group is not None:
            group.healed(member, _number(message, "epoch"), _number(message, "step"))
        return []

    def declare(self, member: int, message: Message) -> list[Order]:
        """A member wants a group of fixed members; it starts when all of them have said so, in the same words."""
        name, members = str(message.get("group")), message.get("members")
        if name == WORLD or name in self.groups or not isinstance(members, list):
            return []
        said = self._declared.setdefault(name, {})
        said[member] = members
        if any(said.get(m) != members for m in members):
            return []
        group = Epochs(name, current=set(members))
        del self._declared[name]
        self.groups[name] = group
        group.change([m for m in members if m in self.people])
        group.losses = 0
        return self._announce(group)

    def lose(self, member: int, why: Why, detail: str = "") -> list[Order]:
        """A member is gone, or is put out: the next epoch of every group that it was in, and of no other."""
        return self.lose_all([member], why, detail)

    def lose_all(self, members: Collection[int], why: Why, detail: str = "") -> list[Order]:
        """Several are lost at once: one epoch follows, which none of them hears of. `detail`: for those put out."""
        lost = [m for m in members if m in self.people]
        orders: list[Order] = []
        for member in lost:
            del self.people[member]
            self.counts[why] += 1
            if why == "left":
                self._forget(member)
            else:
                orders.append((member, {"kind": "fenced", "reason": f"{why}: {detail}" if detail else why}))
        for group in list(self.groups.values()):
            if any(m in group.members for m in lost):
                group.change([m for m in group.members if m not in lost])
                orders += self._announce(group)
                if not group.members and group is not self.world:
                    del self.groups[group.name]
        return orders + self.admit() if lost else []

    def _forget(self, member: int) -> None:
        """It has left in order: it will not vote elsewhere."""
        self._known.pop(member, None)
        self.bases = [[m for m in base if m != member] for base in self.bases]
        self._open = [(epoch, [m for m in members if m != member]) for epoch, members in self._open]

    def failed(self, member: int, message: Message) -> list[Order]:
        """A connection of this group failed although both ends live: build it again, evict on repetition."""
        group = self.groups.get(str(message.get("group")))
        if group is None or _number(message, "epoch") != group.epoch or member not in group.members:
            return []
        self.counts["link failures"] += 1
        peer = message.get("peer")
        pairs = [(member, peer)] if isinstance(peer, int) and peer in group.members and peer != member else []
        return self.suspect_links(group, pairs)

    def suspect_links(self, group: Epochs, pairs: Collection[tuple[int, int]]) -> list[Order]:
        """Members of a group cannot reach each other: a new epoch, and after some the one named most is put out."""
        group.blamed.update(frozenset(pair) for pair in pairs)
        if group.losses >= _REBUILDS and group.blamed:
            worst = group.most_blamed()
            detail = "; ".join(self._blocked(pair, group) for pair in group.blamed if worst in pair)
            group.blamed.clear()
            return self.lose(worst, "unreachable", detail)
        return self._rebuild(group)

    def _blocked(self, pair: frozenset[int], group: Epochs) -> str:
        """From where to where nothing comes through. The higher rank connects, to the lower one's listening port."""
        listens, dials = sorted(pair, key=group.members.index)
        there, here = self.people[listens], self.people[dials]
        targets = ", ".join(f"{host}:{port}" for host, port in there.addresses)
        return f"no data from {here.name} ({here.addresses[0][0]}) to {there.name} ({targets})"

    def begin(self, group: Epochs) -> list[Order]:
        """The next epoch of a group as it is."""
        orders = self._rebuild(group)
        group.losses = 0
        return orders

    def lost_state(self) -> str | None:
        """A sentence when members wait for a state that nobody holds any more."""
        if self.started and self.world.members and not self.world.current:
            return (
                f"no member holds the state after step {self.world.committed}: "
                "all that did are gone; start again from the last checkpoint"
            )
        return None

    def _rebuild(self, group: Epochs) -> list[Order]:
        group.change(list(group.members))
        return self._announce(group)

    def _announce(self, group: Epochs) -> list[Order]:
        if group is self.world and len(group.members) < self.bounds.least:
            told: Message = {
                "kind": "short",
                "group": group.name,
                "epoch": group.epoch,
                "have": len(group.members),
                "need": self.bounds.least,
            }
            return [(m, told) for m in group.members]
        config = group.config()
        config["bases"] = self.bases if group is self.world else []
        if group is self.world:
            self._open.append((group.epoch, list(group.members)))
        config["people"] = [self._card(m) for m in group.members]
        return [(m, config) for m in group.members]

    def _card(self, member: int) -> dict[str, Any]:
        person = self.people[member]
        return {
            "name": person.name,
            "addresses": person.addresses,
            "notice": person.notice,
            "host": person.host,
        }


def _number(message: Message, key: str) -> int:
    value = message.get(key)
    return value if isinstance(value, int) else -1
