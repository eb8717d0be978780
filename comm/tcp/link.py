"""One connection between two ranks: frames out from a queue that all connections of the peer share, frames in."""

from __future__ import annotations

import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from heteromesh.comm.tcp.frame import HEADER, Frame, FrameError, SizeMismatch, checksum, unpack

LOCAL_BUFFER = 1 << 18


@dataclass(slots=True, eq=False)
class Message:
    """One tensor's bytes on their way in or out."""

    view: memoryview
    tag: int
    sequence: int
    mask: int = 0
    checked: bool = False
    check: int = 0
    """checksum() of the bytes that have moved; out: of the whole message, when the caller knows it."""
    assigned: int = 0
    """Bytes given to a connection (out)."""
    moved: int = 0
    """Bytes that the kernel has taken (out) or delivered (in)."""
    done: bool = False
    landing: memoryview | None = None
    """Where the bytes go when the receive is posted after the message came (in)."""

    def move(self, size: int) -> bool:
        """Counts bytes; True when they were the last."""
        self.moved += size
        if self.moved < len(self.view):
            return False
        if self.landing is not None:
            self.landing[:] = self.view
        self.done = True
        return True


class LinkScheduler(Protocol):
    """Decides which of the connections to one peer takes which message."""

    def __bool__(self) -> bool:
        """Tells whether any message waits."""

    def put(self, message: Message) -> None:
        """Takes a message over."""

    def outbox(self, place: int) -> Outbox:
        """Returns where a connection, by its place among the peer's, takes what it sends next."""


class Outbox(LinkScheduler):
    """Messages to one peer in order. Each connection takes the next piece when it has sent its last.

    So fast connections carry more: two NICs of unequal rate, or one slow TCP flow among several, balance themselves.
    """

    def __init__(self, epoch: int, piece: int) -> None:
        self._epoch, self._piece = epoch, piece
        self._queue: deque[Message] = deque()

    def __bool__(self) -> bool:
        return bool(self._queue)

    def put(self, message: Message) -> None:
        self._queue.append(message)

    def outbox(self, place: int) -> Outbox:
        return self

    def take(self) -> tuple[Message, memoryview, bytes] | None:
        """Returns (message, piece of its bytes, header), or None when nothing waits."""
        if not self._queue:
            return None
        message = self._queue[0]
        start, total = message.assigned, len(message.view)
        end = min(start + self._piece, total)
        message.assigned = end
        if end == total:
            self._queue.popleft()
        view = message.view[start:end]
        check = _check(message, view) if message.checked else 0
        frame = Frame(self._epoch, message.tag, message.sequence, start, end - start, total, check, message.mask)
        return message, view, frame.pack()


def _check(message: Message, view: memoryview) -> int:
    if message.check and len(view) == len(message.view):
        return message.check
    return checksum(view)


class Inbox(Protocol):
    """Where arriving messages belong."""

    def match(self, frame: Frame) -> Message | None:
        """Returns the receive that this frame belongs to; None when it is not posted yet."""

    def finished(self, message: Message) -> None:
        """Takes note that the last byte of this message has come or gone."""


class Link:
    """A non-blocking connection. Not thread-safe; the transport's lock guards it."""

    def __init__(self, sock: socket.socket, peer: int, epoch: int, place: int = 0) -> None:
        """`place`: among the connections to this peer."""
        sock.setblocking(False)
        if sock.getsockname()[0] == sock.getpeername()[0]:
            # same host: what fits in the caches is copied twice as fast; between hosts the kernel sizes the buffer
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_BUFFER)
        self.sock, self.peer, self.place, self._epoch = sock, peer, place, epoch
        self.fd = sock.fileno()
        self.parked: Frame | None = None
        """The frame whose receive is not posted; nothing is read before it is."""
        self.ended = False
        """The peer has closed its end."""
        self.flowing = 0
        """Since when a frame has been arriving (time.monotonic_ns()); 0 while none is."""
        self._tally, self._flow, self._received, self._sent_at = [0, 0, 0], 0, 1, 2
        self._parts: list[memoryview | bytes] = []
        self._outgoing: Message | None = None
        self._head = memoryview(bytearray(HEADER))
        self._headed = 0
        self._frame: Frame | None = None
        self._incoming: Message | None = None
        self._body = memoryview(b"")
        self._filled = 0

    def flush(self, outbox: Outbox, inbox: Inbox) -> bool:
        """Sends until the kernel takes no more; True when something is left. Raises OSError."""
        while True:
            if not self._parts:
                piece = outbox.take()
                if piece is None:
                    return False
                self._outgoing, view, header = piece
                self._parts = [header, view]
            try:
                sent = self.sock.sendmsg(self._parts)
            except BlockingIOError:
                return True
            self._sent(sent, inbox)

    def _sent(self, count: int, inbox: Inbox) -> None:
        message = self._outgoing
        assert message is not None
        if len(self._parts) == 2:
            header = self._parts[0]
            if count < len(header):
                self._parts[0] = header[count:]
                return
            count -= len(header)
            del self._parts[0]
        body = self._parts[0]
        if count < len(body):
            self._parts[0] = body[count:]
        else:
            self._parts.clear()
        self._tally[self._sent_at] += count
        if count and message.move(count):
            inbox.finished(message)

    def tally(self, cells: list[int], flow: int, received: int, sent: int) -> None:
        """Counts in these cells of a list from now on: nanoseconds in which a frame was arriving (from its header to
        its last byte), bytes of messages received, and sent."""
        self._tally, self._flow, self._received, self._sent_at = cells, flow, received, sent

    def fill(self, inbox: Inbox, budget: int) -> None:
        """Receives what has come, about `budget` bytes at most. Raises OSError and FrameError."""
        while budget > 0 and self.parked is None:
            try:
                got = self._fill_body(inbox) if self._frame is not None else self._fill_head(inbox)
            except BlockingIOError:
                return
            if not got:
                self.ended = True
                return
            budget -= got

    def resume(self, inbox: Inbox) -> bool:
        """Tries again to place the parked frame; True when that succeeded."""
        if self.parked is None:
            return False
        self._place(self.parked, inbox)
        return self.parked is None

    def _fill_head(self, inbox: Inbox) -> int:
        got = self.sock.recv_into(self._head[self._headed :])
        self._headed += got
        if self._headed == HEADER:
            self._headed = 0
            self._place(unpack(self._head.obj, self._epoch), inbox)  # type: ignore[arg-type]
        elif not got and self._headed:
            raise FrameError("the connection ended within a header")
        return got

    def _place(self, frame: Frame, inbox: Inbox) -> None:
        message = inbox.match(frame)
        if message is None:
            self.parked = frame
            return
        if len(message.view) != frame.total:
            raise SizeMismatch(
                f"message {frame.sequence} with tag {frame.tag} has {frame.total} bytes, "
                f"its receive has room for {len(message.view)}"
            )
        self.parked, self._frame, self._incoming = None, frame, message
        self.flowing = time.monotonic_ns()
        self._body, self._filled = message.view[frame.offset : frame.offset + frame.size], 0

    def _fill_body(self, inbox: Inbox) -> int:
        frame, message = self._frame, self._incoming
        assert frame is not None
        assert message is not None
        got = self.sock.recv_into(self._body[self._filled :])
        if not got:
            raise FrameError("the connection ended within a message")
        self._filled += got
        self._tally[self._received] += got
        if self._filled == frame.size:
            if frame.check and checksum(self._body) != frame.check:
                raise FrameError(f"message {frame.sequence} with tag {frame.tag} was changed on its way")
            message.mask = frame.mask
            message.check = (message.check + frame.check) & ((1 << 64) - 1)
            self._frame = self._incoming = None
            self._body = memoryview(b"")
            self._tally[self._flow] += time.monotonic_ns() - self.flowing
            self.flowing = 0
            if message.move(frame.size):
                inbox.finished(message)
        return got

    def close(self) -> None:
        self.sock.close()
