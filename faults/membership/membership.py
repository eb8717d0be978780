"""Who is in the job: joins and refusals, deaths, epochs. Messages in, messages out; no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.membership.quorum import holds
from heteromesh.faults.wire.bounds import Bounds as Bounds
from heteromesh.faults.wire.messages import (
    FINISHED,
    Evicted,
    FromCoordinator,
    Healed,
    JobStopped,
    JoinInfo,
    LinkFailed,
    TooFew,
    Vote,
)

Order = tuple[int, FromCoordinator]
"""(member, message to it)."""
_REBUILDS = 3
"""Epochs without commit after which a member that failed connections or digests name is evicted."""
LossReason = Literal["left", "died", "silent", "stuck", "unreachable", "diverged", "slow"]


@dataclass(slots=True)
class Membership:
    """The coordinator's state. Every method returns the messages that follow from what it was told."""

    bounds: Bounds = field(default_factory=Bounds)
    facts: dict[str, str] = field(default_factory=dict)
    people: dict[int, JoinInfo] = field(default_factory=dict)
    """Everyone whose connection stands, spares included."""
    world: Epochs = field(default_factory=Epochs)
    counts: Counter[str] = field(default_factory=Counter)
    last: int = 0
    """The highest id given so far; ids are never used again."""
    started: bool = False
    finished: bool = False
    """Whether a member has left because all was done."""
    electing: bool = False
    """No epoch begins before a majority of the last one's members has reported (faults/coordinator/election.py)."""
    elective: bool = False
    """Whether members would elect another coordinator if they lost this one."""
    quorum_sets: list[list[int]] = field(default_factory=list)
    """The epochs' members of whom those who go on must be a quorum (faults/membership/quorum.py)."""
    _known: dict[int, int] = field(default_factory=dict)
    """The newest epoch that each member has said that it knows of, the lost ones too."""
    _open: list[tuple[int, list[int]]] = field(default_factory=list)
    """Epochs that were announced and that not all of their members have said to know of, and those members."""

    @property
    def waiting(self) -> list[int]:
        """Returns those who are not in the world group, in order of arrival."""
        return [m for m in self.people if m not in self.world.members]

    def _admissible(self) -> list[int]:
        """Returns those who may come in: as many as there is room for, and one for each place of the job.

        So a process that replaces one whose loss is not known yet waits until it is.
        """
        taken, ready = {self._place(m) for m in self.world.members}, []
        for member in self.waiting:
            place = self._place(member)
            if place is None or place not in taken:
                ready.append(member)
                taken.add(place)
        return ready[: max(0, self.bounds.max - len(self.world.members))]

    def _in_order(self, members: Collection[int]) -> list[int]:
        """Sorts by place in the job; those of whom that is not known come last, in order of arrival."""
        places = {m: self._place(m) for m in members}
        return sorted(members, key=lambda m: (places[m] is None, places[m] or 0, m))

    def _place(self, member: int) -> int | None:
        return self.people[member].place if member in self.people else None

    def join(self, info: JoinInfo) -> int | str:
        """Returns the new member's id, or the reason of the refusal. `admit` decides when it takes part."""
        if not self.facts:
            self.facts = dict(info.facts)
        differing = [k for k in {**self.facts, **info.facts} if self.facts.get(k) != info.facts.get(k)]
        if differing:
            self.counts["refused"] += 1
            told = "; ".join(
                f"{k} is {info.facts.get(k, 'missing')}, the job's is {self.facts.get(k, 'missing')}"
                for k in sorted(differing)
            )
            return f"this process does not belong to the job: {told}"
        self.elective = self.elective or info.elects
        self.last += 1
        self.people[self.last] = info
        self.counts["joined"] += 1
        return self.last

    def admit(self) -> list[Order]:
        """Starts the job, or an epoch with the waiting members when nobody is in the middle of a step."""
        ready = self._admissible()
        if self.finished and not self.world.members:
            return [(m, JobStopped("all steps of the job are done", FINISHED)) for m in self.waiting]
        if not ready or self.electing or self.lost_quorum():
            return []
        if not self.world.members:
            return self._start(ready) if len(ready) >= self.bounds.min else []
        short = len(self.world.members) < self.bounds.min
        return self._grow(ready) if short and len(self.world.members) + len(ready) >= self.bounds.min else []

    def _start(self, ready: list[int]) -> list[Order]:
        self.started = True
        self.world.chain = ""
        newest = max(self.people[m].step for m in ready)
        source = next(m for m in ready if self.people[m].step == newest)
        like = (newest, self.people[source].state)
        self.world.committed = newest
        self.world.current = {m for m in ready if (self.people[m].step, self.people[m].state) == like}
        self.world.change(self._in_order(ready))
        self.world.losses = 0
        self.quorum_sets, self._open = [list(ready)], []
        return self._announce()

    def knows(self, member: int, epoch: int | None) -> None:
        """Counts that a member has heard of an epoch; when all of it have, those of older ones have no say any more.

        What a member has said counts after its loss too: it cannot elect another coordinator without that epoch's
        quorum.
        """
        if epoch is None or member not in self.people:
            return
        self._known[member] = max(epoch, self._known.get(member, -1))
        for index in reversed(range(len(self._open))):
            number, members = self._open[index]
            if all(self._known.get(m, -1) >= number for m in members):
                self.quorum_sets = self._quorum_sets_from(index)
                del self._open[: index + 1]
                self._known = {m: e for m, e in self._known.items() if m in self.people or self._awaits(m)}
                return

    def _quorum_sets_from(self, index: int) -> list[list[int]]:
        """Returns who has a say once all know this open epoch: newer ones too, into which others may have come."""
        return [list(members) for _, members in self._open[index:]]

    def _awaits(self, member: int) -> bool:
        return any(member in members for _, members in self._open)

    def lost_quorum(self) -> str | None:
        """Returns a sentence when the members that were lost may have elected another coordinator."""
        if not self.elective or not self.started or self.electing or holds(self.people, self.quorum_sets):
            return None
        left = [m for m in self.world.members if m in self.people]
        return (
            f"members {left} are not the larger part of {self.quorum_sets[0]}, who were in the job before: the others "
            "may go on with a coordinator of their own; start again from the last checkpoint if they do not"
        )

    def may_regain_quorum(self) -> bool:
        """Whether those who are left may still say that they know of an epoch in which they are a quorum.

        Only of epochs that were announced before the loss that outvoted them, so that a lost one was in them.
        """
        for index, (number, members) in enumerate(self._open):
            lost = [m for m in members if m not in self.people]
            told = all(self._known.get(m, -1) >= number for m in lost)
            if lost and told and holds(self.people, self._quorum_sets_from(index)):
                return True
        return False

    def _grow(self, ready: list[int]) -> list[Order]:
        self.world.change(self._in_order([*self.world.members, *ready]))
        self.world.losses = 0
        return self._announce()

    def vote(self, member: int, vote: Vote) -> list[Order]:
        """Counts a member's result of a step. When it was the last: commit, and the epoch with those who wait."""
        self.knows(member, vote.epoch)
        if not self.world.vote(member, vote):
            return []
        if not self.world.agreed():
            return self._diverged()
        self.counts["commits"] += 1
        committed = self.world.commit()
        orders: list[Order] = [(m, committed) for m in self.world.members]
        ready = self._admissible()
        return orders + self._grow(ready) if ready else orders

    def _diverged(self) -> list[Order]:
        self.counts["divergences"] += 1
        minority = self.world.minority()
        if self.world.losses >= _REBUILDS:
            return [order for m in minority for order in self.lose(m, "diverged")]
        return self._rebuild()

    def healed(self, member: int, message: Healed) -> list[Order]:
        """Counts a member that has received the state."""
        self.world.healed(member, message.epoch, message.step)
        return []

    def lose(self, member: int, why: LossReason, detail: str = "") -> list[Order]:
        """Takes out a member that is gone, or is put out: the next epoch follows."""
        return self.lose_all([member], why, detail)

    def lose_all(self, members: Collection[int], why: LossReason, detail: str = "") -> list[Order]:
        """Takes out several at once: one epoch follows, which none of them hears of. `detail`: for those put out."""
        lost = [m for m in members if m in self.people]
        orders: list[Order] = []
        for member in lost:
            del self.people[member]
            self.counts[why] += 1
            if why == "left":
                self._forget(member)
            else:
                orders.append((member, Evicted(f"{why}: {detail}" if detail else why)))
        if any(m in self.world.members for m in lost):
            self.world.change([m for m in self.world.members if m not in lost])
            orders += self._announce()
        return orders + self.admit() if lost else []

    def _forget(self, member: int) -> None:
        """Forgets one that has left in order: it will not vote elsewhere."""
        self._known.pop(member, None)
        self.quorum_sets = [[m for m in members if m != member] for members in self.quorum_sets]
        self._open = [(epoch, [m for m in members if m != member]) for epoch, members in self._open]

    def failed(self, member: int, message: LinkFailed) -> list[Order]:
        """Builds the epoch again after a failed connection although both ends live; evicts on repetition."""
        members, peer = self.world.members, message.peer
        if message.epoch != self.world.epoch or member not in members:
            return []
        self.counts["link failures"] += 1
        return self.suspect_links([(member, peer)] if peer is not None and peer in members and peer != member else [])

    def suspect_links(self, pairs: Collection[tuple[int, int]]) -> list[Order]:
        """Begins a new epoch as members cannot reach each other; after some the one named most is put out."""
        self.world.blamed.update(frozenset(pair) for pair in pairs)
        if self.world.losses >= _REBUILDS and self.world.blamed:
            worst = self.world.most_blamed()
            detail = "; ".join(self._blocked(pair) for pair in self.world.blamed if worst in pair)
            self.world.blamed.clear()
            return self.lose(worst, "unreachable", detail)
        return self._rebuild()

    def _blocked(self, pair: frozenset[int]) -> str:
        """Says from where to where nothing comes through. The higher rank connects to the lower one's port."""
        listens, dials = sorted(pair, key=self.world.members.index)
        there, here = self.people[listens], self.people[dials]
        targets = ", ".join(f"{host}:{port}" for host, port in there.addresses)
        return f"no data from {here.name} ({here.addresses[0][0]}) to {there.name} ({targets})"

    def begin(self) -> list[Order]:
        """Begins the next epoch with the same members."""
        orders = self._rebuild()
        self.world.losses = 0
        return orders

    def lost_state(self) -> str | None:
        """Returns a sentence when members wait for a state that nobody holds any more."""
        if self.started and self.world.members and not self.world.current:
            return (
                f"no member holds the state after step {self.world.committed}: "
                "all that did are gone; start again from the last checkpoint"
            )
        return None

    def last_holders(self, lost: Collection[int]) -> set[int]:
        """Returns those who hold the state, if nobody else would hold it when these members were lost."""
        holders = self.world.current & set(self.world.members)
        return holders if holders <= set(lost) else set()

    def end(self) -> None:
        """Forgets all members: those who come next begin a job of their own, with the state that they bring."""
        self.people.clear()
        self.world.members = []
        self.quorum_sets, self._open, self._known = [], [], {}

    def _rebuild(self) -> list[Order]:
        self.world.change(self._in_order(self.world.members))
        return self._announce()

    def _announce(self) -> list[Order]:
        members = list(self.world.members)
        if len(members) < self.bounds.min:
            return [(m, TooFew(len(members), self.bounds.min)) for m in members]
        self._open.append((self.world.epoch, members))
        # facts and states were compared when they joined
        people = tuple(replace(self.people[m], facts={}, state="") for m in members)
        epoch = replace(self.world.announcement(), quorum_sets=self.say(), people=people)
        return [(m, epoch) for m in members]

    def say(self) -> tuple[tuple[int, ...], ...]:
        """Returns the quorum sets as messages have them."""
        return tuple(tuple(members) for members in self.quorum_sets)
