"""Ranks on the TCP data plane in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from heteromesh.comm.tcp.abort import Abort
from heteromesh.comm.tcp.connect import Place, build
from heteromesh.comm.tcp.listen import Listener
from heteromesh.comm.tcp.transport import TcpTransport

SECRET = b"test"


@contextmanager
def mesh(
    size: int, links: int = 1, epoch: int = 1, hosts: tuple[str, ...] = ("127.0.0.1",)
) -> Iterator[tuple[list[TcpTransport], ThreadPoolExecutor]]:
    """Transports of `size` ranks in this process, and a pool with a thread for each."""
    listeners = [Listener(SECRET, hosts) for _ in range(size)]
    addresses = [listener.addresses for listener in listeners]
    places = [Place(addresses=addresses, rank=r, epoch=epoch, links=links) for r in range(size)]
    with ThreadPoolExecutor(size) as pool:
        transports = list(pool.map(lambda r: build(listeners[r], places[r], SECRET, Abort()), range(size)))
        try:
            yield transports, pool
        finally:
            for transport in transports:
                transport.close()
            for listener in listeners:
                listener.close()


def everywhere(pool: ThreadPoolExecutor, act: Callable[..., Any], transports: Iterable[Any]) -> list[Any]:
    """Returns what `act` does of each, all at once."""
    return list(pool.map(act, transports))
