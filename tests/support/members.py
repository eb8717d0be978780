"""A job of members in this process, for tests."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing


@contextmanager
def job(size, timing=None, bounds=None):
    """`size` members in this process, and a pool with a thread for each."""
    server = Coordinator(b"s", bounds=bounds or Bounds(min=size), timing=timing or Timing(silence=10)).start()
    members = [Member(JoinOptions(coordinators=[server.address], secret=b"s", name=str(i))) for i in range(size)]
    with ThreadPoolExecutor(size) as pool:
        try:
            yield server, members, pool
        finally:
            for member in members:
                member.close()
            server.stop()
