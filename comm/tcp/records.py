"""Records of the operations on one TCP transport: a ring of the last ones, and counters by peer that only grow.

C4D's records (arXiv 2406.04594) without a device: which operation, entered and left when, how long it waited for whom,
and how long bytes of whom were on their way. A sum of 1 MB pays a few microseconds for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

from heteromesh.comm.tcp.info import TcpInfo, tcp_info, together

if TYPE_CHECKING:
    from heteromesh.comm.tcp.link import Link
    from heteromesh.comm.tcp.transport import TcpTransport

KEEP = 1024
"""Operations in the ring."""
P = ParamSpec("P")
T = TypeVar("T")


class Counts(NamedTuple):
    """By rank; of everything on the transport so far, or within one operation. Times are nanoseconds."""

    waited: tuple[int, ...]
    """Blocked on a message that the rank must send."""
    late: tuple[int, ...]
    """Of that, while no byte of the rank was arriving: it had not begun to send."""
    pushed: tuple[int, ...]
    """Blocked on a message that the rank must take."""
    flow: tuple[int, ...]
    """From the first to the last byte of its messages, whether anybody was blocked or not; of parallel connections
    the mean."""
    received: tuple[int, ...]
    """Bytes of it."""
    sent: tuple[int, ...]
    """Bytes to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One collective on this rank."""

    name: str
    sequence: int
    """From 1; the n-th collective of an epoch has the same number on every rank."""
    enter: float
    """time.monotonic(), seconds."""
    exit: float
    counts: Counts


class Records:
    """Written by the transport and its collectives; read by any thread, without a lock."""

    def __init__(self, size: int, links: Mapping[int, Sequence[Link]], keep: int = KEEP) -> None:
        """`links`: the connections by peer; `size`: ranks of the transport."""
        self._size = size
        self._links = [links.get(rank, ()) for rank in range(size)]
        # all counters in one list: a record of an operation is one copy of it
        self._cells = [0] * (len(Counts._fields) * size)
        self._late, self._pushed, self._flow = size, 2 * size, 3 * size
        for peer, some in links.items():
            for link in some:
                link.tally(self._cells, self._flow + peer, 4 * size + peer, 5 * size + peer)
        self._ring: list[tuple[str, int, int, list[int]] | None] = [None] * keep
        self.name = ""
        """Of the operation under way, or the last one."""
        self.entered = self.finished = 0
        self.began = self.since = time.monotonic_ns()
        """When the transport was made; when the last operation was entered or left."""
        self.inside = 0
        """Nanoseconds in operations that have been left."""
        self.planned = 0.0
        """Seconds of work that plans have foreseen for this rank, in steps that are done; of whoever plans."""

    def enter(self, name: str) -> None:
        """Takes note that an operation begins; one at a time."""
        self.name = name
        self.since = time.monotonic_ns()
        self.entered += 1

    def exit(self) -> None:
        """Takes note that it has ended, in order or not."""
        now = time.monotonic_ns()
        self._ring[self.finished % len(self._ring)] = (self.name, self.since, now, self._cells[:])
        self.inside += now - self.since
        self.since = now
        self.finished += 1

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Keeps a record of the block; one within another is part of it."""
        if self.entered > self.finished:
            yield
            return
        self.enter(name)
        try:
            yield
        finally:
            self.exit()

    def waited(self, peer: int, incoming: bool, began: int, flow: int) -> None:
        """Counts time blocked since `began` on a message from (or to) the peer, whose flow was `flow` then."""
        now = time.monotonic_ns()
        spent = now - began
        if not incoming:
            self._cells[self._pushed + peer] += spent
            return
        self._cells[peer] += spent
        late = spent - self.flow(peer, now) + flow
        if late > 0:
            self._cells[self._late + peer] += late

    def flow(self, peer: int, now: int) -> int:
        """Returns the nanoseconds in which a message of the peer was arriving; of parallel connections the mean."""
        links, total = self._links[peer], self._cells[self._flow + peer]
        for link in links:
            if link.flowing:
                total += now - link.flowing
        return total // len(links) if len(links) > 1 else total

    def counts(self, now: int) -> Counts:
        """Returns everything so far. `now`: time.monotonic_ns()."""
        return self._counts(self._cells)._replace(flow=tuple(self.flow(peer, now) for peer in range(self._size)))

    def operations(self) -> list[Operation]:
        """Returns the last ones in order; the oldest of a full ring only serves as the base of the next."""
        keep, last = len(self._ring), self.finished
        first = max(0, last - keep)
        base, found = [0] * len(self._cells), []
        for index in range(first, last):
            entry = self._ring[index % keep]
            if entry is None:
                continue
            name, enter, left, cells = entry
            if index > first or not first:
                counts = self._counts([b - a for a, b in zip(base, cells, strict=True)])
                found.append(
                    Operation(name=name, sequence=index + 1, enter=enter / 1e9, exit=left / 1e9, counts=counts)
                )
            base = cells
        return found

    def _counts(self, cells: list[int]) -> Counts:
        counts = Counts(*(tuple(cells[at : at + self._size]) for at in range(0, len(cells), self._size)))
        flow = zip(counts.flow, self._links, strict=True)
        return counts._replace(flow=tuple(ns // max(1, len(links)) for ns, links in flow))

    def connections(self) -> dict[int, TcpInfo]:
        """Returns, by peer, what the kernel knows now; without those that are closed."""
        found = {}
        for peer, links in enumerate(self._links):
            with suppress(OSError):
                if links:
                    found[peer] = together([tcp_info(link.sock) for link in links])
        return found


def recorded(
    act: Callable[Concatenate[TcpTransport, P], T],
) -> Callable[Concatenate[TcpTransport, P], T]:
    """Makes a collective keep a record of each call. One within another is part of it."""

    @wraps(act)
    def call(transport: TcpTransport, *args: P.args, **kwargs: P.kwargs) -> T:
        with transport.records.operation(act.__name__):
            return act(transport, *args, **kwargs)

    return cast("Callable[Concatenate[TcpTransport, P], T]", call)
