"""The coordinator: one small asyncio server that decides epochs and commits for a job.

It moves no tensors. It can run in a thread of the launcher or of a member (`Coordinator.start`), or stand-alone on any
host: `python -m heteromesh.faults.coordinator --port 29400 --secret-file FILE --members 4:8`
(faults/coordinator/main.py).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from heteromesh.comm.tcp.auth import ANSWER_HEAD, Acceptor
from heteromesh.comm.tcp.info import tcp_info
from heteromesh.comm.tcp.listen import most_handshakes
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.ballot import Ballot
from heteromesh.faults.coordinator.election import Election
from heteromesh.faults.diagnosis.monitor import Monitor
from heteromesh.faults.membership.liveness import MemberLiveness, silent, stalled, stuck
from heteromesh.faults.membership.membership import Bounds, LossReason, Membership, Order
from heteromesh.faults.wire.codec import Wire, encode
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.faults.wire.messages import (
    LOST_STATE,
    Alive,
    ControlMessage,
    EndJob,
    Evicted,
    FromCoordinator,
    Healed,
    Heartbeat,
    JobStopped,
    Join,
    JoinInfo,
    Leave,
    LinkFailed,
    Malformed,
    MemberDied,
    NewEpoch,
    OperationReport,
    Refused,
    Rejoin,
    Vote,
    Welcome,
)

_READ = 1 << 16


class _Line:
    """One member's control connection."""

    def __init__(self, wire: Wire, writer: asyncio.StreamWriter, liveness: MemberLiveness) -> None:
        self.wire, self.writer, self.liveness = wire, writer, liveness
        self.member: int | None = None
        self.spoke = 0.0

    def send(self, message: FromCoordinator) -> None:
        self.write(encode(message))

    def write(self, body: bytes) -> None:
        self.spoke = time.monotonic()
        if not self.writer.is_closing():
            self.writer.write(self.wire.seal(body))

    def deaf(self) -> bool:
        """Whether the member's kernel does not acknowledge what was sent."""
        with suppress(OSError):
            return tcp_info(self.writer.get_extra_info("socket")).retrying > 0
        return False


class Coordinator:
    """Serves one job until `stop`. Its `membership` tells what happened (counts), read from any thread."""

    def __init__(
        self,
        secret: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        bounds: Bounds | None = None,
        timing: Timing | None = None,
        election: Election | None = None,
        own: int | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        """`election`: this coordinator replaces a lost one and begins when a majority has reported to it. `own`: the
        member in this process. `monitor`: gathers reports and says diagnoses; without one the lines go to the log and
        events stay in memory."""
        self._secret, self._host, self._port = secret, host, port
        self.timing = timing or Timing()
        self.membership = Membership(bounds or Bounds(), electing=election is not None)
        self._own = own
        self._ballot = Ballot(election, self.timing, self._conclude, self._give_up) if election is not None else None
        self.monitor = monitor or Monitor()
        self.address = (host, port)
        self.ended = ""
        """Why it ended by itself: members that may have elected another coordinator outvote those it has left."""
        self._lines: dict[int, _Line] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._unproved: dict[asyncio.StreamWriter, None] = {}
        """Connections that have not proved themselves, the oldest first."""
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._short = 0.0
        self._held: list[Order] = []
        """What is not said before it is known whether the members that are left may go on."""
        self._patience: asyncio.TimerHandle | None = None

    def start(self) -> Coordinator:
        """Serves in a thread of its own; `address` is valid then. Raises UserError when the port is taken."""
        try:
            server = self._loop.run_until_complete(self._listen())
        except OSError as error:
            self._loop.close()
            raise UserError(
                f"the coordinator cannot listen on {self._host}:{self._port} ({error.strerror or error}): "
                "give each job a port of its own, or 0 for any free one"
            ) from None
        self._thread = threading.Thread(target=self._run, args=(server,), name="heteromesh-coordinator", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the job's coordination: members lose their connections."""
        if self._thread is not None and self._thread.is_alive():
            with suppress(RuntimeError):  # it has just ended by itself and closed its loop
                self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    @property
    def running(self) -> bool:
        """Is true from `start` to `stop`, or until it has ended by itself (`ended` says why)."""
        return self._thread is not None and self._thread.is_alive()

    async def _listen(self) -> asyncio.Server:
        self._loop.set_exception_handler(self._wrong)
        # so many are accepted at once before any of them is looked at
        backlog = most_handshakes()
        server = await asyncio.start_server(self._serve, self._host, self._port, limit=_READ, backlog=backlog)
        self.address = server.sockets[0].getsockname()[:2]
        return server

    def _run(self, server: asyncio.Server) -> None:
        try:
            self._loop.run_until_complete(self._until_stopped(server))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _until_stopped(self, server: asyncio.Server) -> None:
        watching = asyncio.ensure_future(self._watch())
        if self._ballot is not None:
            self._ballot.begin()
        await self._stopping.wait()
        server.close()
        watching.cancel()
        if self._ballot is not None:
            self._ballot.end()
        for writer in list(self._writers):
            writer.transport.abort()
        mine = asyncio.current_task()
        # the readers see the end of their connections; cancelling them would be reported as an error
        await asyncio.gather(*(t for t in asyncio.all_tasks() if t is not mine), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._unproved[writer] = None
        if len(self._unproved) > most_handshakes():
            # the one that has waited for longest: a flood of silent ones must not keep members out
            next(iter(self._unproved)).transport.abort()
        line: _Line | None = None
        try:
            async with asyncio.timeout(self.timing.leave):
                line = await self._prove(reader, writer)
            del self._unproved[writer]
            while data := await reader.read(_READ):
                for message in line.wire.feed(data):
                    self._heard(line, message)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            # a dead member's reset is no foreign traffic; an unproved connection and a broken seal are
            if line is None or line.member is None:
                self.membership.counts["foreign"] += 1
        finally:
            self._writers.discard(writer)
            self._unproved.pop(writer, None)
            if line is not None and line.member is not None:
                self._gone(line.member, "died")
            writer.transport.abort()

    def _wrong(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "out of system resource" in str(context.get("message")):
            self.membership.counts["exhausted"] += 1  # asyncio accepts again in a second
        else:
            loop.default_exception_handler(context)

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Line:
        acceptor = Acceptor(self._secret)
        writer.write(acceptor.hello)
        head = await reader.readexactly(ANSWER_HEAD)
        _, proof = acceptor.check(head, await reader.readexactly(acceptor.rest(head)))
        writer.write(proof)
        return _Line(Wire(acceptor.session, "coordinator"), writer, MemberLiveness(self.timing, time.monotonic()))

    def _heard(self, line: _Line, message: ControlMessage) -> None:
        member = line.member
        if member is None:
            self._introduced(line, message)
        elif member not in self._lines:
            self.membership.counts["fenced"] += 1  # what a member says after its eviction
        else:
            self._told(line, member, message, time.monotonic())

    def _introduced(self, line: _Line, message: ControlMessage) -> None:
        match message:
            case Join(info):
                self._join(line, info)
            case Rejoin():
                self._rejoin(line, message)
            case Malformed("join" | "rejoin" as kind):
                line.send(Refused(f"a {kind} message that is malformed"))
            case _:
                self.membership.counts["fenced"] += 1

    def _told(self, line: _Line, member: int, message: ControlMessage, now: float) -> None:
        match message:
            case Heartbeat():
                line.liveness.beat(message, now)
                self.membership.knows(member, message.epoch)
                if self._patience is not None:
                    self._act(())
            case Malformed("hb"):
                line.liveness.beat(None, now)
            case Vote():
                self._act(self.membership.vote(member, message))
            case Healed():
                self._act(self.membership.healed(member, message))
            case LinkFailed():
                self._loop.call_later(self.timing.verdict, self._failed, member, message)
            case MemberDied(dead):
                self._gone(dead, "died")
            case Leave(finished):
                self.membership.finished = self.membership.finished or finished
                self._gone(member, "left")
            case EndJob(reason):
                self._end(reason, LOST_STATE)
            case OperationReport():
                self.monitor.heard(member, message, now)
            case _:
                self.membership.counts["malformed"] += 1

    def _join(self, line: _Line, info: JoinInfo) -> None:
        if self.membership.electing:
            line.writer.close()  # it comes again when there is a job to join
            return
        answer = self.membership.join(info)
        if isinstance(answer, str):
            line.send(Refused(answer))
            return
        line.member = answer
        self._lines[answer] = line
        line.send(self._welcome(answer))
        full = len(self.membership.people) >= self.membership.bounds.max
        if not self.membership.started and self.timing.gather and not full:
            self._loop.call_later(self.timing.gather, lambda: self._act(self.membership.admit()))
        else:
            self._act(self.membership.admit())

    def _rejoin(self, line: _Line, message: Rejoin) -> None:
        if self._ballot is None or not self.membership.electing:
            if self._patience is not None:
                line.writer.close()  # it comes again when this is decided
            else:
                line.send(Refused(f"member {message.member} was put out of the job"))
            return
        self._ballot.election.add(message)
        line.member = message.member
        self.membership.facts = self.membership.facts or dict(message.info.facts)
        self.membership.people[line.member] = message.info
        self._lines[line.member] = line
        line.send(self._welcome(line.member))
        self._ballot.look()

    def _conclude(self) -> None:
        # some may have died while the others were waited for
        election = self._ballot.election if self._ballot is not None else None
        if election is not None and self.membership.electing and election.quorum():
            self._act(election.conclude(self.membership))

    def _give_up(self) -> None:
        if self.membership.electing:
            self._step_down("no quorum of the last epoch's members came to this candidate")

    def _step_down(self, reason: str) -> None:
        """Ends without a word: all members, those that seemed lost too, look for a coordinator that has a quorum."""
        if not self.ended:
            self.monitor.ended(reason)
        self.ended = self.ended or reason  # members that leave afterwards would change the reason
        self._stopping.set()

    def _welcome(self, member: int) -> Welcome:
        return Welcome(member=member, bounds=self.membership.bounds, timing=self.timing)

    def _failed(self, member: int, message: LinkFailed) -> None:
        self._act(self.membership.failed(member, message))

    def _gone(self, member: int, why: LossReason) -> None:
        self._lost([member], why)

    def _lost(self, members: Sequence[int], why: LossReason) -> None:
        lost = [m for m in members if m in self.membership.people]
        if lost:
            self._act(self.membership.lose_all(lost, why))
        if self._ballot is not None and self.membership.electing:
            for member in members:
                self._ballot.lose(member)

    def _act(self, orders: Iterable[Order]) -> None:
        self._held += orders
        lost_quorum = self.membership.lost_quorum()
        if lost_quorum is not None:
            self._hold(lost_quorum)
            return
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        # a commit that only the member in this process had heard of would be lost with both
        orders, self._held = sorted(self._held, key=lambda order: order[0] == self._own), []
        sets = self.membership.say()
        gone: list[int] = []
        bodies: dict[int, bytes] = {}  # most messages go to many members: each is encoded once
        self.monitor.observe(self.membership, orders)
        for member, message in orders:
            line = self._lines.get(member)
            if line is None:
                continue
            if id(message) not in bodies:
                # what was held back says who has a say now
                now = replace(message, quorum_sets=sets) if isinstance(message, NewEpoch) else message
                bodies[id(message)] = encode(now)
            line.write(bodies[id(message)])
            if isinstance(message, Evicted):
                gone.append(member)
        for member in [*gone, *(m for m in self._lines if m not in self.membership.people)]:
            line = self._lines.pop(member, None)
            if line is not None:
                line.writer.close()
        reason = self.membership.lost_state()
        if reason is not None:
            self._end(reason, LOST_STATE)

    def _hold(self, reason: str) -> None:
        """Says nothing more: ends, unless those who are left may still turn out to be a quorum of a newer epoch."""
        if not self.membership.may_regain_quorum():
            self._step_down(reason)
        elif self._patience is None:
            self._patience = self._loop.call_later(self.timing.silence, self._step_down, reason)

    def _end(self, reason: str, cause: str = "") -> None:
        self.monitor.ended(reason)
        for line in self._lines.values():
            line.send(JobStopped(reason, cause))
            line.writer.close()
        self._lines.clear()
        self.membership.end()

    async def _watch(self) -> None:
        period = min(self.timing.heartbeat, self.timing.silence / 10)
        due = time.monotonic() + period
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            late = now - due
            if late > period:
                # this process did not run: what the others sent meanwhile is still unread
                for line in self._lines.values():
                    line.liveness.compensate(late)
            due = now + period
            with suppress(ConnectionError):
                self._inspect(now)
                for line in self._lines.values():
                    # one that has become quiet is spoken to: its kernel answers, or it does not
                    quiet = now - line.liveness.seen > self.timing.silence / 4
                    if quiet or now - line.spoke > self.timing.hang / 8:
                        line.send(Alive())

    def _inspect(self, now: float) -> None:
        liveness = {m: line.liveness for m, line in self._lines.items()}
        quiet = [m for m in silent(liveness, now) if not self.monitor.moves(m, now)]
        spared = self.membership.last_holders(quiet)
        quiet = [m for m in quiet if m not in spared or self._is_gone(m, now)]
        for member in quiet:
            self.monitor.hung(self.membership, "silent", [member], deaf=self._lines[member].deaf())
        self._lost(quiet, "silent")
        for member in stuck(liveness, self.membership.world, now):
            self.monitor.hung(self.membership, "stuck", [member])
            self._gone(member, "stuck")
        pairs = stalled({m: line.liveness for m, line in self._lines.items()}, self.membership.world, now)
        pairs = pairs or self.monitor.dead_links(self.membership.world, now, 2 * self.timing.silence)
        if pairs:
            self.monitor.hung(self.membership, "stalled", pairs[0])
            self.membership.counts["stalled links"] += len(pairs)
            self._act(self.membership.suspect_links(pairs))
            for member in self.membership.world.members:
                if member in self._lines:
                    self._lines[member].liveness.ticked = now
        for member in self.monitor.slow(self.membership, now):
            self._gone(member, "slow")
        self._count_down(now)

    def _is_gone(self, member: int, now: float) -> bool:
        """Whether one without whom nobody would hold the state is not to be waited for any more."""
        line = self._lines[member]
        return line.deaf() or now - line.liveness.seen > self.timing.patience

    def _count_down(self, now: float) -> None:
        world = self.membership.world
        if not world.members or len(world.members) >= self.membership.bounds.min:
            self._short = 0.0
            return
        self._short = self._short or now
        if now - self._short > self.timing.patience:
            self._end(
                f"{len(world.members)} members are left and the job needs {self.membership.bounds.min}: "
                f"nobody joined within {self.timing.patience:g} s"
            )

    @property
    def short_seconds(self) -> float | None:
        """Returns how long a job that has lost too many members still waits for others; None while it has enough."""
        since = self._short
        return max(0.0, since + self.timing.patience - time.monotonic()) if since else None
