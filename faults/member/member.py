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
from heteromesh.faults.member.group import EpochGroup
from heteromesh.faults.member.host_watch import HostPeers
from heteromesh.faults.member.rejoin import candidate, refusal, rejoin
from heteromesh.faults.membership.liveness import CoordinatorLiveness
from heteromesh.faults.membership.view import Fenced, View, stop_of, view_of
from heteromesh.faults.wire.codec import WireError
from heteromesh.faults.wire.control import Address, enrol
from heteromesh.faults.wire.messages import (
    CommitNotice,
    ControlMessage,
    EpochReport,
    Evicted,
    FromMember,
    Healed,
    Heartbeat,
    JobStopped,
    Join,
    JoinInfo,
    Leave,
    Malformed,
    MemberDied,
    NewEpoch,
    Rejoin,
    TooFew,
    Vote,
    Welcome,
)


@dataclass(slots=True)
class GroupState:
    """What a member knows of its job's epochs, as the control thread keeps it."""

    view: View | None = None
    told: View | None = None
    """The newest one that the coordinator was told to be known here."""
    committed: int = 0
    chain: str = ""
    agreed: int = -1
    """The newest epoch with a commit: all of its members know it, so those of older ones have no say any more."""
    stale: bool = False
    """Whether this member still lacks the state of that view."""
    abort: Abort | None = None
    """The state of the epoch that the group's owner works in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinOptions:
    """How to join a job."""

    coordinators: Sequence[Address]
    """Tried in this order; more than one lets the job survive the loss of its coordinator."""
    secret: bytes
    name: str
    facts: dict[str, str] = field(default_factory=dict)
    """Must be equal in the whole job: version, model, plan, ..."""
    place: int | None = None
    """Which rank of the whole job this is, where that is known."""
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
    """Made by `Member(options)`, which blocks until the job has answered; `close` when done.

    `id` is this member's for good once it has been in an epoch; one that waits to join gets another when the
    coordinator is lost meanwhile.

    Raises UserError when the job refuses this process, and ConnectionError when there is no coordinator.
    """

    def __init__(self, options: JoinOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._state = GroupState()
        self._group = EpochGroup(self)
        self._over: Exception | None = None
        self._lost_at = 0.0
        """Since when there is no coordinator that has a quorum; 0 while there is one."""
        self._ticks = 0
        self.listener = Listener(options.secret, options.hosts)
        self._peers = HostPeers(self._report_death)
        self._closing = Abort()
        try:
            self._candidate: Coordinator | None = None
            self.id = self._introduce()
        except BaseException:
            self._peers.close()
            self.listener.close()
            self._closing.close()
            raise
        self._thread = threading.Thread(target=self._run, name="heteromesh-control", daemon=True)
        self._thread.start()

    def _info(self) -> JoinInfo:
        options = self.options
        return JoinInfo(
            name=options.name,
            addresses=tuple(self.listener.addresses),
            facts=options.facts,
            step=options.step,
            state=options.state,
            death_notice=self._peers.path,
            host=self._peers.host,
            elects=len(options.coordinators) > 1,
            place=options.place,
        )

    def _introduce(self) -> int:
        options = self.options
        self._control, answers = enrol(
            options.coordinators, options.secret, Join(self._info()), seconds=options.connect_seconds
        )
        answer, self._early = answers[0], answers[1:]
        if not isinstance(answer, Welcome):
            self._control.close()
            raise UserError(refusal(answer))
        self._bounds, self._timing = answer.bounds, answer.timing
        self._limit()
        return answer.member

    def _limit(self) -> None:
        self._control.limit(self._timing.silence if self.options.silence is None else self.options.silence)

    @property
    def coordinates(self) -> bool:
        """Whether the job's coordinator runs in this process, elected by the others."""
        return self._candidate is not None and self._candidate.running

    def group(self) -> EpochGroup:
        """Returns the group of all members, always the same object."""
        return self._group

    def tick(self) -> None:
        """Says that the main thread is alive: call it now and then in long computations."""
        self._ticks += 1

    def send(self, message: FromMember) -> None:
        """Sends to the coordinator; a lost connection shows in the next wait, not here."""
        if isinstance(message, Healed | Vote):
            with self._lock:
                state = self._state
                if isinstance(message, Healed):
                    state.stale = False
                elif state.view is not None and state.view.epoch == message.epoch:
                    state.told = state.view  # whoever has a result of an epoch knows of it
        with suppress(OSError):
            self._control.send(message)

    def await_view(self, after: int) -> tuple[View, Abort]:
        """Returns the newest epoch, when it is newer than `after`, and a fresh abort state for it. Blocks.

        Raises Fenced and Stopped.
        """
        with self._lock:
            state = self._state
            while state.view is None or state.view.epoch <= after:
                self._check()
                self._changed.wait()
            self._check()
            state.abort = Abort()
            return state.view, state.abort

    def is_newest(self, epoch: int) -> bool:
        """Tells whether nothing newer than this epoch is known. Raises Fenced and Stopped."""
        with self._lock:
            self._check()
            view = self._state.view
            return view is not None and view.epoch == epoch

    def await_decision(self, epoch: int, step: int) -> bool:
        """Returns True when the step is committed; False when the epoch has ended without that. Blocks.

        Raises Fenced and Stopped.
        """
        with self._lock:
            state = self._state
            while state.committed <= step:
                self._check()
                if state.view is None or state.view.epoch != epoch:
                    return False
                self._changed.wait()
            return True

    def committed(self) -> tuple[int, str]:
        """Returns (steps committed, hash chain) as far as this member knows."""
        with self._lock:
            return self._state.committed, self._state.chain

    def close(self, *, finished: bool = False) -> None:
        """Leaves the job in order and closes its group; no thread may use it any more. Again does nothing.

        `finished`: all that the job was to do is done, so that whoever joins now is told so.
        """
        if self._closing.error is not None:
            return
        self.send(Leave(finished=finished))
        self._closing.set(GroupAborted("the member left"))
        self._thread.join()
        self._group.close()
        if self._candidate is not None:
            self._candidate.stop()
        self._peers.close()
        self.listener.close()
        self._closing.close()

    def _check(self) -> None:
        if self._over is not None:
            raise type(self._over)(*self._over.args)

    def _report_death(self, member: int) -> None:
        self.send(MemberDied(member))

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
        """Returns nothing when there is a coordinator again, else the reason why not."""
        options, view = self.options, self._state.view
        if len(options.coordinators) < 2:
            return lost
        self._lost_at = self._lost_at or time.monotonic()
        if self._candidate is not None:
            self._candidate.stop()
            self._candidate = None
        answer = rejoin(
            options.coordinators,
            options.secret,
            Join(self._info()) if view is None else Rejoin(self.id, self._report(view), self._info()),
            began=self._lost_at,
            rank=None if view is None else view.rank,
            stand=self._stand,
            wanted=lambda: self._closing.error is None,
        )
        if isinstance(answer, str):
            return answer
        self._control, self._early = answer[0], answer[1][1:]
        self._limit()
        welcome = answer[1][0]
        if view is None and isinstance(welcome, Welcome):
            self.id, self._lost_at = welcome.member, 0.0
        return ""

    def _stand(self) -> Coordinator | None:
        self._candidate = candidate(self.options.coordinators, self.options.secret, self._bounds, self._timing, self.id)
        return self._candidate

    def _report(self, view: View) -> EpochReport:
        with self._lock:
            state = self._state
            told = state.told or view
            return EpochReport(
                epoch=told.epoch,
                known=view.epoch,
                committed=state.committed,
                chain=state.chain,
                stale=state.stale,
                members=told.members,
                quorum_sets=() if state.agreed == told.epoch else told.quorum_sets,
                addresses=told.addresses,
            )

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
        # where no other can be elected nothing is won by giving up one that was stopped and may wake up
        alone, floor = len(self.options.coordinators) < 2, self._timing.hang
        coordinator = CoordinatorLiveness(self._timing, due, max(floor, self._timing.patience) if alone else floor)
        while self._closing.error is None and self._over is None:
            now = time.monotonic()
            coordinator.compensate(now - due)
            if now >= due or self._untold():
                self._beat()
                report = self._group.report(now) if now >= due else None
                if report is not None:
                    self._control.send(report)
                due = now + self._timing.heartbeat
            for fd, _ in poll.poll(max(0.0, due - now)):
                if fd == self._control.fileno():
                    for message in self._control.receive():
                        self._heard(message)
                    coordinator.heard(time.monotonic())
            coordinator.check(time.monotonic())

    def _untold(self) -> bool:
        """Whether the coordinator must hear that this epoch is known: the sooner, the fewer losses end the job."""
        return self._state.view is not self._state.told and not self._lost_at

    def _beat(self) -> None:
        # a candidate is not told of epochs that are not its own
        view = None if self._lost_at else self._state.view
        epoch, waiting = self._group.waiting()
        self._control.send(
            Heartbeat(
                tick=self._ticks + self._group.moved,
                epoch=None if view is None else view.epoch,
                waiting=waiting,
                waiting_in=epoch,
            )
        )
        self._state.told = view or self._state.told

    def _heard(self, message: ControlMessage) -> None:
        match message:
            case NewEpoch():
                self._configure(view_of(message, self.id))
                self._peers.watch(self.id, message.members, message.people)
            case CommitNotice():
                with self._lock:
                    state = self._state
                    state.committed, state.chain, state.agreed = message.committed, message.chain, message.epoch
                    self._changed.notify_all()
            case TooFew(have, need):
                self._abort(f"only {have} of at least {need} members are left")
            case Evicted(reason):
                self._end(Fenced(f"member {self.id} was put out of the job: {reason}"))
            case JobStopped():
                self._end(stop_of(message))
            case Malformed("epoch" | "commit" | "short" | "fenced" | "stop" as kind):
                raise WireError(f"a message of the kind {kind} that is malformed")

    def _configure(self, view: View) -> None:
        with self._lock:
            state = self._state
            state.view, state.committed, state.chain = view, view.committed, view.chain
            state.stale = self.id in view.stale
            self._lost_at = 0.0
        self._abort(f"epoch {view.epoch} begins")

    def _abort(self, reason: str) -> None:
        with self._lock:
            abort, self._state.abort = self._state.abort, None
            self._changed.notify_all()
        if abort is not None:
            abort.set(GroupAborted(reason))

    def _end(self, error: Exception) -> None:
        with self._lock:
            if self._over is None:
                self._over = error
            abort = self._state.abort
            self._changed.notify_all()
        if abort is not None:
            abort.set(GroupAborted(str(error)))
