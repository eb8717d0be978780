"""A job of members in this process, for tests."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing


def free_addresses(count):
    """`count` addresses of this machine on which nobody listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[:2] for sock in sockets]


def wait_until(true, seconds=120.0):
    """Waits until `true()`; fails after so many seconds."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def job(size, timing=None, bounds=None):
    """`size` members in this process, and a pool with a thread for each."""
    server = Coordinator(b"s", bounds=bounds or Bounds(min=size), timing=timing or Timing(silence=30, hang=30)).start()
    members = [Member(JoinOptions(coordinators=[server.address], secret=b"s", name=str(i))) for i in range(size)]
    with ThreadPoolExecutor(size) as pool:
        try:
            yield server, members, pool
        finally:
            for member in members:
                member.close()
            server.stop()
