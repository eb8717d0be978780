"""The TCP data plane: CPU tensors between the ranks of one epoch of one group, abortable at any moment.

No thread of its own and no time limit. Whoever waits drives every connection (one thread at a time, the others wait
for it), bytes arrive straight in the tensors' memory, and an abort, a lost peer or a foreign frame ends every wait of
the transport at once: the state of `comm/tcp/abort.py` is one of the things that the driver polls.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from heteromesh.comm.interfaces import Work
from heteromesh.comm.tcp.abort import Abort, GroupAborted
from heteromesh.comm.tcp.frame import Frame, SizeMismatch, bytes_of
from heteromesh.comm.tcp.link import Link, LinkScheduler, Message, Outbox
from heteromesh.comm.tcp.records import Records

_READ = select.EPOLLIN | select.EPOLLRDHUP
_BUDGET = 4 << 20
"""Bytes received from one connection before the others have their turn."""


class TcpWork(Work):
    """A posted message."""

    __slots__ = ("_keep", "_message", "_peer", "_transport")

    def __init__(self, transport: TcpTransport, message: Message, peer: int, keep: torch.Tensor | None) -> None:
        self._transport, self._message, self._peer = transport, message, peer
        self._keep = keep  # what is sent must stay alive

    @property
    def check(self) -> int:
        """The sum of the checksums of a received message's pieces; 0 when it was not checked."""
        return self._message.check

    def wait(self) -> int:
        """Returns the mask when the message has arrived, or may be reused. Raises GroupAborted."""
        self._transport.complete(self._message, self._peer)
        self._keep = None
        return self._message.mask


class _Peer:
    """What there is to know of one other rank."""

    def __init__(self, links: Sequence[Link], scheduler: LinkScheduler) -> None:
        self.links, self.scheduler = links, scheduler
        self.sent: defaultdict[int, int] = defaultdict(int)
        self.posted: defaultdict[int, int] = defaultdict(int)
        self.receives: dict[tuple[int, int], Message] = {}
        self.early: dict[tuple[int, int], Message] = {}
        """Messages that came before their receives, in buffers of their own."""

    def match(self, frame: Frame) -> Message | None:
        key = (frame.tag, frame.sequence)
        return self.receives.get(key) or self.early.get(key)

    def finished(self, message: Message) -> None:
        key = (message.tag, message.sequence)
        if self.receives.get(key) is message:
            del self.receives[key]


class TcpTransport:
    """A `Transport` (comm/interfaces.py) over connected, authenticated sockets; `comm/tcp/connect.py` makes them.

    Waits may be made from several threads. Between the posting of a message and somebody's wait bytes move only as far
    as the kernel's buffers go.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        epoch: int,
        sockets: Mapping[int, Sequence[socket.socket]],
        abort: Abort,
        piece: int = 1 << 20,
        schedulers: Mapping[int, LinkScheduler] | None = None,
    ) -> None:
        """`sockets`: one or more per other rank. `piece`: bytes that one of several connections takes at a time, where
        there are no `schedulers` for the peers' connections."""
        self.rank, self.size, self.epoch = rank, size, epoch
        self.abort = abort
        self._lock = threading.Lock()
        self._turned = threading.Condition(self._lock)
        self._driven, self._followers, self._closed = False, 0, False
        self._poll = select.epoll()
        self._poll.register(abort.fileno(), select.EPOLLIN)
        self._peers: dict[int, _Peer] = {}
        self._links: dict[int, Link] = {}
        self._writing: set[int] = set()
        self._waiting: list[tuple[Message, _Peer]] = []
        self.moved = 0
        """Turns in which bytes moved: the sign of life of an operation under way."""
        for peer, ends in sockets.items():
            links = [Link(end, peer, epoch, place) for place, end in enumerate(ends)]
            whole = piece if len(links) > 1 else 1 << 31
            self._peers[peer] = _Peer(links, schedulers[peer] if schedulers else Outbox(epoch, whole))
            for link in links:
                self._links[link.fd] = link
                self._poll.register(link.fd, _READ)
        self.records = Records(size, {peer: end.links for peer, end in self._peers.items()})
        abort.on_set(self._shut)

    def send(self, peer: int, tensor: torch.Tensor, tag: int) -> TcpWork:
        """Starts to send a contiguous CPU tensor; it must not change before the work is done."""
        return self.send_bytes(peer, bytes_of(tensor), tag, keep=tensor)

    def recv(self, peer: int, tensor: torch.Tensor, tag: int) -> TcpWork:
        """Posts a receive into a contiguous CPU tensor of the sender's size in bytes."""
        return self.recv_bytes(peer, bytes_of(tensor), tag)

    def send_bytes(
        self,
        peer: int,
        view: memoryview,
        tag: int,
        *,
        mask: int = 0,
        checked: bool = False,
        check: int = 0,
        keep: torch.Tensor | None = None,
    ) -> TcpWork:
        """Does what `send` does, with a contributor mask and, when `checked`, a checksum (given or computed)."""
        self._check_peer(peer, view)
        with self._guarded():
            end = self._peers[peer]
            message = Message(view, tag, end.sent[tag], mask, checked, check)
            end.sent[tag] += 1
            end.scheduler.put(message)
            self._check_alive(end)
            for link in end.links:
                if link.fd not in self._writing and end.scheduler:
                    self._flush(link, end)
        return TcpWork(self, message, peer, keep)

    def recv_bytes(self, peer: int, view: memoryview, tag: int) -> TcpWork:
        self._check_peer(peer, view)
        with self._guarded():
            end = self._peers[peer]
            message = Message(view, tag, end.posted[tag])
            end.posted[tag] += 1
            key = (tag, message.sequence)
            early = end.early.pop(key, None)
            if early is None:
                end.receives[key] = message
                self._resume(end)
                self._check_alive(end)
            else:
                message = self._adopt(end, key, early, view)
        return TcpWork(self, message, peer, None)

    def complete(self, message: Message, peer: int) -> None:
        """Returns when the message is done, driving the connections meanwhile. Raises GroupAborted."""
        if message.done:
            return
        with self._lock:
            entry = (message, end) = (message, self._peers[peer])
            incoming = end.receives.get((message.tag, message.sequence)) is message
            began = time.monotonic_ns()
            flow = self.records.flow(peer, began)
            self._waiting.append(entry)
            try:
                while not message.done:
                    self.abort.check()
                    if self._closed:
                        raise GroupAborted("the transport was closed")
                    if self._driven:
                        self._follow()
                    else:
                        self._drive()
            finally:
                self._waiting.remove(entry)
                self.records.waited(peer, incoming, began, flow)
                if self._followers:
                    self._turned.notify_all()

    def stalled_on(self) -> tuple[int, ...]:
        """Returns the ranks whose bytes (either way) somebody waits for now; read without the lock, for diagnosis."""
        waiting = [end for _, end in list(self._waiting)]
        return tuple(sorted(peer for peer, end in self._peers.items() if end in waiting))

    def links_to(self, peer: int) -> Sequence[Link]:
        """Returns the connections with one rank."""
        return self._peers[peer].links

    def close(self) -> None:
        """Ends the transport and its abort state; works under way raise."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._turned.notify_all()
            driven = self._driven
            for link in self._links.values():
                if driven:
                    with suppress(OSError):
                        link.sock.shutdown(socket.SHUT_RDWR)
                else:
                    link.close()
            if not driven:
                self._poll.close()
        self.abort.set(GroupAborted("the transport was closed"))
        self.abort.close()

    def _check_peer(self, peer: int, view: memoryview) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            raise ValueError(f"rank {peer} is no peer of rank {self.rank} in a group of {self.size}")
        if not len(view):
            raise ValueError("an empty message cannot be sent or received")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._lock:
            self.abort.check()
            if self._closed:
                raise GroupAborted("the transport was closed")
            yield
        # outside the lock: a failed connection found while posting aborts the group
        self.abort.check()

    def _follow(self) -> None:
        self._followers += 1
        try:
            self._turned.wait()
        finally:
            self._followers -= 1

    def _drive(self) -> None:
        """Takes one turn: waits for events without the lock, then moves bytes with it."""
        for message, end in self._waiting:
            if not message.done:
                self._absorb(end)
        self._driven = True
        self._lock.release()
        try:
            events = self._poll.poll()
        finally:
            self._lock.acquire()
            self._driven = False
        if self._closed:
            self._finish_close()
            return
        for fd, what in events:
            link = self._links.get(fd)
            if link is not None:
                self._serve(link, what)
        self.moved += 1
        if self._followers:
            self._turned.notify_all()

    def _finish_close(self) -> None:
        for link in self._links.values():
            link.close()
        self._poll.close()

    def _serve(self, link: Link, what: int) -> None:
        end = self._peers[link.peer]
        if what & select.EPOLLOUT:
            self._flush(link, end)
        if what & ~select.EPOLLOUT:
            if link.parked is not None and what & (select.EPOLLERR | select.EPOLLHUP):
                self._lost(link, "connection reset by peer")
                return
            try:
                link.fill(end, _BUDGET)
            except OSError as error:
                self._lost(link, error)
                return
            if link.parked is not None:
                self._interest(link)
            if link.ended:
                self._ended(link, end)

    def _flush(self, link: Link, end: _Peer) -> None:
        try:
            more = link.flush(end.scheduler.outbox(link.place), end)
        except OSError as error:
            self._lost(link, error)
            return
        if more != (link.fd in self._writing):
            (self._writing.add if more else self._writing.discard)(link.fd)
            self._interest(link)

    def _interest(self, link: Link) -> None:
        what = (0 if link.parked is not None or link.ended else _READ) | (
            select.EPOLLOUT if link.fd in self._writing else 0
        )
        if link.fd in self._links:
            self._poll.modify(link.fd, what)

    def _ended(self, link: Link, end: _Peer) -> None:
        """Lets a peer that has left in order close first; it is lost when something of it is still due."""
        others = [other for other in end.links if not other.ended]
        if others:
            self._interest(link)
        elif end.receives or end.scheduler or link.fd in self._writing:
            self._lost(link, "connection closed by peer")
        else:
            self._poll.unregister(link.fd)
            del self._links[link.fd]
            link.close()

    def _lost(self, link: Link, reason: OSError | str) -> None:
        # the state's callback wants the lock, which this thread holds
        what = f"rank {self.rank} lost rank {link.peer}: {reason}"
        error = GroupAborted(what, peer=link.peer, disagreed=isinstance(reason, SizeMismatch))
        self._lock.release()
        try:
            self.abort.set(error)
        finally:
            self._lock.acquire()

    def _shut(self) -> None:
        """Lets the peers know: their connections to this rank end now."""
        with self._lock:
            for link in self._links.values():
                with suppress(OSError):
                    link.sock.shutdown(socket.SHUT_RDWR)
            self._turned.notify_all()

    def _check_alive(self, end: _Peer) -> None:
        if all(link.ended for link in end.links):
            self._lost(end.links[0], "connection closed by peer")

    def _resume(self, end: _Peer) -> None:
        for link in end.links:
            if link.parked is not None:
                self._try_resume(link, end)

    def _try_resume(self, link: Link, end: _Peer) -> None:
        try:
            if link.resume(end):
                self._interest(link)
        except OSError as error:
            self._lost(link, error)

    def _absorb(self, end: _Peer) -> None:
        """Makes room for what arrived too early, so that the message somebody waits for can come behind it."""
        for link in end.links:
            frame = link.parked
            if frame is not None:
                key = (frame.tag, frame.sequence)
                if key not in end.early:
                    end.early[key] = Message(memoryview(bytearray(frame.total)), frame.tag, frame.sequence)
                self._try_resume(link, end)

    def _adopt(self, end: _Peer, key: tuple[int, int], early: Message, view: memoryview) -> Message:
        """Posts the receive of a message that has come, or is coming, before it."""
        if len(early.view) != len(view):
            raise SizeMismatch(
                f"message {early.sequence} with tag {early.tag} has {len(early.view)} bytes, "
                f"its receive has room for {len(view)}"
            )
        if early.done:
            view[:] = early.view
        else:
            early.landing = view
            end.receives[key] = early
        return early
