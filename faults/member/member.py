"""One process's membership in a job: joins, beats, hears of epochs and commits, aborts its groups when they change."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from heteromesh.comm.tcp.abort import Abort, GroupAborted
from heteromesh.comm.tcp.listen import Listener
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.group import Group
from heteromesh.faults.member.host_watch import Kin
from heteromesh.faults.member.rejoin import candidate, rejoin
from heteromesh.faults.membership.deadlines import Timing
from heteromesh.faults.membership.liveness import Answers
from heteromesh.faults.membership.membership import WORLD, Bounds
from heteromesh.faults.membership.view import Fenced, Stopped, View, view_of
from heteromesh.faults.wire.control import Address, enrol
from heteromesh.faults.wire.messages import Message


@dataclass(slots=True)
class Seat:
    """A member's place in one group, as the control thread keeps it."""

    view: View | None = None
    told: View | None = None
    """The newest one that the coordinator was told to be known here; of the world group only."""
    committed: int = 0
    chain: str = ""
    agreed: int = -1
    """The newest epoch with a commit: all of its members know it, so those of older ones have no say any more."""
    stale: bool = False
    """Whether this member still lacks the state of that view."""
    abort: Abort | None = None
    """The state of the epoch that the group's owner works in."""
    group: Group | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """How to join a job."""

    coordinators: Sequence[Address]
    """Tried in this order; more than one lets the job survive the loss of its coordinator."""
    secret: bytes
    name: str
    facts: dict[str, str] = field(default_factory=dict)
    """Must be equal in the whole job: version, model, plan, ..."""
    hosts: Sequence[str] = ("127.0.0.1",)
    """Addresses of this machine for the data plane, one for each NIC to be used."""
    links: int = 1
    """Connections between each two members: several for long fat links, at least one for each NIC."""
    step: int = 0
    """Steps that this process's state has behind it."""
    state: str = ""
    """A digest of that state: members that start with the same one need no copy of it."""
    silence: float | None = None
    """Seconds without acknowledgement after which the coordinator's host counts as lost; None: `Timing.silence`."""
    connect_seconds: float = 10.0
    """How long to look for a coordinator: it may be about to start, or to be elected."""


class Member:
    """Made by `Member(terms)`, which blocks until the job has answered; `close` when done.

    `id` is this member's for good once it has been in an epoch; one that waits to join gets another when the
    coordinator is lost meanwhile.

    Raises UserError when the job refuses this process, and ConnectionError when there is no coordinator.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._seats: dict[str, Seat] = {WORLD: Seat()}
        self._over: Exception | None = None
        self._lost_at = 0.0
        """Since when there is no coordinator that has a quorum; 0 while there is one."""
        self._ticks = 0
        self.listener = Listener(terms.secret, terms.hosts)
        self._kin = Kin(self._report_death)
        self._closing = Abort()
        try:
            self._candidate: Coordinator | None = None
            self.id = self._introduce()
        except BaseException:
            self._kin.close()
            self.listener.close()
            self._closing.close()
            raise
        self._thread = threading.Thread(target=self._run, name="heteromesh-control", daemon=True)
        self._thread.start()

    def _card(self) -> Message:
        terms = self.terms
        return {
            "name": terms.name,
            "addresses": self.listener.addresses,
            "facts": terms.facts,
            "step": terms.step,
            "state": terms.state,
            "notice": self._kin.path,
            "host": self._kin.host,
            "elects": len(terms.coordinators) > 1,
        }

    def _introduce(self) -> int:
        terms = self.terms
        self._control, answers = enrol(
            terms.coordinators, terms.secret, {"kind": "join", **self._card()}, seconds=terms.connect_seconds
        )
        answer, self._early = answers[0], answers[1:]
        if answer["kind"] != "welcome":
            self._control.close()
            raise UserError(str(answer.get("reason", "the coordinator did not welcome this process")))
        self._bounds, self._timing = Bounds(**answer["bounds"]), Timing(**answer["timing"])
        self._limit()
        return int(answer["member"])

    def _limit(self) -> None:
        self._control.limit(self._timing.silence if self.terms.silence is None else self.terms.silence)

    def group(self, name: str = WORLD, members: Sequence[int] = ()) -> Group:
        """The group of these members (ids), or the world group, which is everyone. All members of a named group must
        ask for it with the same list; it has no epoch before they have."""
        with self._lock:
            seat = self._seats.setdefault(name, Seat())
            if seat.group is not None:
                return seat.group
            seat.group = Group(self, name)
        if name != WORLD:
            self.send({"kind": "group", "group": name, "members": list(members)})
        return seat.group

    def tick(self) -> None:
        """The main thread is alive: call it now and then in long computations."""
        self._ticks += 1

    def send(self, message: Message) -> None:
        """To the coordinator; a lost connection shows in the next wait, not here."""
        kind = message["kind"]
        if kind in ("healed", "fin"):
            with self._lock:
                seat = self._seats[message["group"]]
                if kind == "healed":
                    seat.stale = False
                elif message["group"] == WORLD and seat.view is not None and seat.view.epoch == message["epoch"]:
                    seat.told = seat.view  # whoever has a result of an epoch knows of it
        with suppress(OSError):
            self._control.send(message)

    def await_view(self, name: str, after: int) -> tuple[View, Abort]:
        """The newest epoch of a group, when it is newer than `after`, and a fresh abort state for it. Blocks.

        Raises Fenced and Stopped.
        """
        with self._lock:
            seat = self._seats[name]
            while seat.view is None or seat.view.epoch <= after:
                self._check()
                self._changed.wait()
            self._check()
            seat.abort = Abort()
            return seat.view, seat.abort

    def is_newest(self, name: str, epoch: int) -> bool:
        """Whether nothing newer than this epoch is known. Raises Fenced and Stopped."""
        with self._lock:
            self._check()
            view = self._seats[name].view
            return view is not None and view.epoch == epoch

    def await_verdict(self, name: str, epoch: int, step: int) -> bool:
        """True when the step is committed; False when the epoch has ended without that. Blocks.

        Raises Fenced and Stopped.
        """
        with self._lock:
            seat = self._seats[name]
            while seat.committed <= step:
                self._check()
                if seat.view is None or seat.view.epoch != epoch:
                    return False
                self._changed.wait()
            return True

    def committed(self, name: str) -> tuple[int, str]:
        """(steps committed, hash chain) as far as this member knows."""
        with self._lock:
            seat = self._seats[name]
            return seat.committed, seat.chain

    def close(self) -> None:
        """Leaves the job in order and closes its groups; no thread may use them any more. Again does nothing."""
        if self._closing.error is not None:
            return
        self.send({"kind": "leave"})
        self._closing.set(GroupAborted("the member left"))
        self._thread.join()
        for seat in self._seats.values():
            if seat.group is not None:
                seat.group.close()
        if self._candidate is not None:
            self._candidate.stop()
        self._kin.close()
        self.listener.close()
        self._closing.close()

    def _check(self) -> None:
        if self._over is not None:
            raise type(self._over)(*self._over.args)

    def _report_death(self, member: int) -> None:
        self.send({"kind": "dead", "member": member})

    def _run(self) -> None:
        lost = ""
        while self._closing.error is None and self._over is None:
            if lost:
                lost = self._reelect(lost)
                if lost:
                    self._end(Fenced(f"member {self.id} lost the coordinator: {lost}"))
                    break
            try:
                self._listen()
            except (OSError, ValueError, KeyError) as error:
                lost = str(error)
            self._control.close()
        self._end(Fenced(f"member {self.id} has left the job"))

    def _reelect(self, lost: str) -> str:
        """Empty when there is a coordinator again, else the reason why not."""
        terms, view = self.terms, self._seats[WORLD].view
        if len(terms.coordinators) < 2:
            return lost
        self._lost_at = self._lost_at or time.monotonic()
        if self._candidate is not None:
            self._candidate.stop()
            self._candidate = None
        answer = rejoin(
            terms.coordinators,
            terms.secret,
            {"kind": "join", **self._card()}
            if view is None
            else {"kind": "rejoin", "member": self.id, "groups": self._reports(), **self._card()},
            began=self._lost_at,
            rank=None if view is None else view.rank,
            stand=self._stand,
            wanted=lambda: self._closing.error is None,
        )
        if isinstance(answer, str):
            return answer
        self._control, self._early = answer[0], answer[1][1:]
        self._limit()
        if view is None:
            self.id, self._lost_at = int(answer[1][0]["member"]), 0.0
        return ""

    def _stand(self) -> Coordinator | None:
        self._candidate = candidate(self.terms.coordinators, self.terms.secret, self._bounds, self._timing)
        return self._candidate

    def _reports(self) -> dict[str, Message]:
        with self._lock:
            return {name: self._report(seat, seat.view) for name, seat in self._seats.items() if seat.view is not None}

    def _report(self, seat: Seat, view: View) -> Message:
        told = seat.told or view
        return {
            "epoch": told.epoch,
            "known": view.epoch,
            "committed": seat.committed,
            "chain": seat.chain,
            "stale": seat.stale,
            "members": told.members,
            "bases": [] if seat.agreed == told.epoch else told.bases,
            "addresses": told.addresses,
        }

    def _listen(self) -> None:
        poll = select.epoll()
        try:
            poll.register(self._control.fileno(), select.EPOLLIN)
            poll.register(self._closing.fileno(), select.EPOLLIN)
            for message in self._early:
                self._heard(message)
            self._attend(poll)
        finally:
            poll.close()

    def _attend(self, poll: select.epoll) -> None:
        due = time.monotonic()
        answers = Answers(self._timing, due)
        while self._closing.error is None and self._over is None:
            now = time.monotonic()
            answers.forgive(now - due)
            if now >= due or self._untold():
                self._beat()
                if now >= due:
                    for report in self._reports_due(now):
                        self._control.send(report)
                due = now + self._timing.heartbeat
            for fd, _ in poll.poll(max(0.0, due - now)):
                if fd == self._control.fileno():
                    for message in self._control.receive():
                        self._heard(message)
                    answers.came(time.monotonic())
            answers.check(time.monotonic())

    def _untold(self) -> bool:
        """An epoch counts once all of it have said that they know of it: the sooner, the fewer losses end the job."""
        seat = self._seats[WORLD]
        return seat.view is not seat.told and not self._lost_at

    def _beat(self) -> None:
        seat = self._seats[WORLD]
        # a candidate is not told of epochs that are not its own
        view = None if self._lost_at else seat.view
        self._control.send({"kind": "hb", **self._pulse(), "epoch": None if view is None else view.epoch})
        seat.told = view or seat.told

    def _pulse(self) -> Message:
        blocked, moved = {}, 0
        for name, seat in list(self._seats.items()):
            if seat.group is not None:
                moved += seat.group.moved
                waits = seat.group.blocked()
                if waits is not None:
                    blocked[name] = waits
        return {"tick": self._ticks + moved, "blocked": blocked}

    def _reports_due(self, now: float) -> list[Message]:
        groups = [seat.group for seat in list(self._seats.values()) if seat.group is not None]
        return [report for group in groups if (report := group.report(now)) is not None]

    def _heard(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "config":
            self._configure(view_of(message, self.id))
            if message["group"] == WORLD:
                self._kin.watch(self.id, message["members"], message["people"])
        elif kind == "commit":
            with self._lock:
                seat = self._seats[message["group"]]
                seat.committed, seat.chain, seat.agreed = message["committed"], message["chain"], message["epoch"]
                self._changed.notify_all()
        elif kind == "short":
            self._abort(message["group"], f"only {message['have']} of at least {message['need']} members are left")
        elif kind == "fenced":
            self._end(Fenced(f"member {self.id} was put out of the job: {message['reason']}"))
        elif kind == "stop":
            self._end(Stopped(message["reason"]))

    def _configure(self, view: View) -> None:
        with self._lock:
            seat = self._seats.setdefault(view.group, Seat())
            seat.view, seat.committed, seat.chain = view, view.committed, view.chain
            seat.stale = self.id in view.stale
            if view.group == WORLD:
                self._lost_at = 0.0
        self._abort(view.group, f"epoch {view.epoch} of {view.group} begins")

    def _abort(self, name: str, reason: str) -> None:
        with self._lock:
            abort, self._seats[name].abort = self._seats[name].abort, None
            self._changed.notify_all()
        if abort is not None:
            abort.set(GroupAborted(reason))

    def _end(self, error: Exception) -> None:
        with self._lock:
            if self._over is None:
                self._over = error
            aborts = [seat.abort for seat in self._seats.values() if seat.abort is not None]
            self._changed.notify_all()
        for abort in aborts:
            abort.set(GroupAborted(str(error)))
