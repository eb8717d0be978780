"""Loss of the coordinator, splits, elections; the coordinator as a process of its own."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from members import free_addresses, wait_until

from heteromesh.errors import UserError
from heteromesh.faults.coordinator.election import Election
from heteromesh.faults.coordinator.main import SECRET, main, read_bounds, read_secret
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member import rejoin as rejoining
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.membership.view import Fenced
from heteromesh.faults.wire.control import connect
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.faults.wire.messages import JoinInfo, Vote


@pytest.fixture
def jobs():
    """Makes members of a job with three addresses for its coordinator; ends them all."""
    with ExitStack() as stack:
        addresses, members = free_addresses(3), []
        terms = JoinOptions(coordinators=addresses, secret=b"s", name="")

        def make(size, fewest, **timing):
            host, port = addresses[0]
            server = Coordinator(
                b"s",
                host=host,
                port=port,
                bounds=Bounds(min=fewest),
                timing=Timing(
                    **{"silence": 10.0, "heartbeat": 0.02, "gather": 0.0 if fewest == size else 1.0, **timing}
                ),
            )
            stack.callback(server.start().stop)
            members.extend(Member(replace(terms, name=str(i))) for i in range(size))
            return server, members

        yield make
        for member in reversed(members):
            member.close()


@contextmanager
def hanging(server):
    """Within this a coordinator does nothing, as a process that is stopped or hangs; its connections stand."""
    reached, on = threading.Event(), threading.Event()
    server._loop.call_soon_threadsafe(lambda: (reached.set(), on.wait()))
    reached.wait()
    try:
        yield
    finally:
        on.set()


def cut(member):
    """Ends its control connection, as seen from here."""
    member._control._sock.shutdown(socket.SHUT_RDWR)


def begin(pool, members):
    steps = [Steps(member.group()) for member in members]
    list(pool.map(lambda s: s.start(), steps))
    list(pool.map(lambda s: s.reduce([torch.ones(10)]), steps))
    return steps


def test_coordinator_is_lost_in_the_middle_of_steps(jobs):
    server, members = jobs(3, fewest=3)
    values, longest, chains = [torch.full((20_000,), 10.0**i) for i in range(3)], [0.0] * 3, []

    def act(index):
        steps = Steps(members[index].group())
        steps.start()
        while steps.step < 300:
            start = time.monotonic()
            commit = steps.reduce([values[index]])
            longest[index] = max(longest[index], time.monotonic() - start)
            assert bool((commit.sums[0] == 111).all())
            if index == 0 and commit.step == 100:
                threading.Thread(target=server.stop).start()
        chains.append(members[index].committed())

    with ThreadPoolExecutor(3) as pool:
        for wait in [pool.submit(act, index) for index in range(3)]:
            wait.result(30)
    assert len(set(chains)) == 1
    assert chains[0][0] == 300
    assert max(longest) < 5  # 0.1 s on a quiet machine


def test_who_waits_to_join_joins_the_next_coordinator(jobs):
    server, members = jobs(2, fewest=2)
    for member in members:
        member.await_view(-1)
    waiting = Member(replace(members[0].options, name="late"))
    with waiting._lock:
        assert waiting._state.view is None  # nobody makes steps, so nobody commits
    server.stop()
    everyone = [*members, waiting]

    def act(member):
        steps = Steps(member.group())
        steps.start()
        for _ in range(2000):
            if len(steps.reduce([torch.ones(10)]).contributors) == 3:
                return member.id
            time.sleep(0.005)
        raise AssertionError("the one that waited never came")

    with ThreadPoolExecutor(3) as pool:
        assert [wait.result(30) for wait in [pool.submit(act, member) for member in everyone]] == [1, 2, 3]
    waiting.close()


def test_majority_that_loses_its_coordinator_goes_on_and_the_minority_ends(jobs, monkeypatch):
    """Three of five lose it before it can say anything of the first loss, and cannot reach the other two any more."""
    monkeypatch.setattr(rejoining, "LIMIT", 3.0)
    server, members = jobs(5, fewest=2)
    with ThreadPoolExecutor(5) as pool:
        steps = begin(pool, members)
        apart = free_addresses(1)
        for index, member in enumerate(members):
            reachable = [server.address] if index < 2 else apart
            member.options = replace(member.options, coordinators=[*reachable, ("127.0.0.1", 1)])
        with hanging(server):
            for member in members[2:]:
                cut(member)
            wait_until(lambda: all(member._lost_at for member in members[2:]))
        commits = [pool.submit(s.reduce, [torch.ones(10)]) for s in steps]
        for wait in commits[2:]:
            assert wait.result(150).contributors == tuple(m.id for m in members[2:])
        assert "are not the larger part of [1, 2, 3, 4, 5]" in server.ended
        for wait in commits[:2]:
            with pytest.raises(Fenced, match="cut off from the majority"):
                wait.result(150)
    assert not server.running


def test_members_lost_one_after_another_are_fenced_and_the_others_go_on(jobs, monkeypatch):
    """Each loss is known to all who are left before the next: what is left is a quorum each time."""
    monkeypatch.setattr(rejoining, "LIMIT", 0.5)
    server, members = jobs(5, fewest=1)
    with ThreadPoolExecutor(5) as pool:
        steps = begin(pool, members)
        members, lost = sorted(members, key=lambda m: m.id), []
        while len(members) > 1:
            lost.append(members.pop())
            lost[-1].options = replace(lost[-1].options, coordinators=[("127.0.0.1", 1), ("127.0.0.1", 2)])
            cut(lost[-1])
            there = [member.id for member in members]
            wait_until(lambda there=there: server.membership.quorum_sets == [there])
        last = next(s for s in steps if s._group._member is members[0])
        assert last.reduce([torch.ones(10)]).contributors == (members[0].id,)
        for member in lost:
            with pytest.raises(Fenced):
                member.await_view(1 << 20)


def test_coordinator_that_hangs_is_replaced_and_ends_when_it_wakes_up(jobs):
    server, members = jobs(3, fewest=3, hang=0.4)
    with ThreadPoolExecutor(3) as pool:
        steps = begin(pool, members)
        with hanging(server):
            for wait in [pool.submit(s.reduce, [torch.ones(10)]) for s in steps]:
                assert len(wait.result(150).contributors) == 3
        wait_until(lambda: not server.running)
        assert "are not the larger part" in server.ended
        for wait in [pool.submit(s.reduce, [torch.ones(10)]) for s in steps]:
            assert wait.result(150).step == 2


def test_who_joins_in_the_moment_of_an_election_joins_when_it_is_over():
    address = free_addresses(1)[0]
    candidate = Coordinator(b"s", host=address[0], port=address[1], election=Election()).start()
    with ThreadPoolExecutor(1) as pool:
        terms = JoinOptions(coordinators=[address, ("127.0.0.1", 1)], secret=b"s", name="late", connect_seconds=150.0)
        wait = pool.submit(Member, terms)
        wait_until(lambda: not candidate.running)  # it has refused it for so long
        assert not wait.done()
        server = Coordinator(b"s", host=address[0], port=address[1]).start()
        member = wait.result(150)
        assert member.id == 1
        member.close()
        server.stop()


def test_nobody_answers_for_as_long_as_was_asked_for():
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"reaches no coordinator at 127\.0\.0\.1:1 \(.*refused.*127\.0\.0\.1:2"):
        Member(
            JoinOptions(coordinators=[("127.0.0.1", 1), ("127.0.0.1", 2)], secret=b"s", name="", connect_seconds=0.3)
        )
    assert time.monotonic() - start >= 0.3


def test_address_that_never_answers_holds_up_nobody():
    with socket.create_server(("127.0.0.1", 0)) as hung:  # accepts and says nothing
        server = Coordinator(b"s").start()
        start = time.monotonic()
        connect([hung.getsockname()[:2], server.address], b"s", seconds=100).close()
        assert time.monotonic() - start < 90
        server.stop()
        with pytest.raises(ConnectionError, match="no answer"):
            connect([hung.getsockname()[:2]], b"s", seconds=0.1)


def test_jumps_of_the_systems_clock_change_nothing(jobs, monkeypatch):
    """Hours back and forth while members step, one dies, the coordinator is replaced and leases are watched."""
    dice, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + dice.choice([-86400.0, 86400.0, 3600.0]))
    server, members = jobs(3, fewest=2)
    with ThreadPoolExecutor(3) as pool:
        steps = begin(pool, members)
        server.stop()
        for wait in [pool.submit(s.reduce, [torch.ones(10)]) for s in steps]:
            assert len(wait.result(150).contributors) == 3
        members.pop().close()  # its watchers and those of its lease end, too
        for wait in [pool.submit(s.reduce, [torch.ones(10)]) for s in steps[:2]]:
            assert len(wait.result(150).contributors) == 2


def command(*words, **environment):
    clean = {k: v for k, v in os.environ.items() if k != SECRET}
    return subprocess.Popen(
        [sys.executable, "-m", "heteromesh.faults.coordinator", *words],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stand_alone_coordinator_serves_and_ends_when_told(tmp_path, number):
    secret = b"sixteen bytes or more"
    file = tmp_path / "secret"
    file.write_bytes(secret + b"\n")
    file.chmod(0o600)
    process = command("--host", "127.0.0.1", "--port", "0", "--secret-file", str(file), "--members", "1:2")
    try:
        host, port = process.stdout.readline().split()[-1].split(":")
        member = Member(JoinOptions(coordinators=[(host, int(port))], secret=secret, name="a"))
        steps = Steps(member.group())
        steps.start()
        assert steps.reduce([torch.ones(3)]).step == 0
        member.close()
        process.send_signal(number)
        assert process.communicate(timeout=150) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_stand_alone_coordinator_on_a_taken_port_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = command("--host", "127.0.0.1", "--port", str(port), HETEROMESH_SECRET="s" * 16)
        _, error = process.communicate(timeout=150)
    assert process.returncode == 2
    assert f"127.0.0.1:{port}" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--members", "5:4"], "--members 5:4 is not MIN:MAX"),
        (["--members", "x"], "--members x is not MIN:MAX"),
        (["--members", "0"], "--members 0 is not MIN:MAX"),
        (["--port", "65536"], "--port 65536 is no port"),
        (["--secret-file", "/nowhere/secret"], "--secret-file /nowhere/secret cannot be read"),
    ],
)
def test_bad_arguments_of_the_stand_alone_coordinator(words, text, monkeypatch, capsys):
    monkeypatch.setenv(SECRET, "s" * 16)
    assert main(words) == 2
    assert text in capsys.readouterr().err


def test_secrets_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(SECRET, raising=False)
    with pytest.raises(UserError, match=f"--secret-file, or set the environment variable {SECRET}"):
        read_secret(None)
    monkeypatch.setenv(SECRET, "x" * 15)
    with pytest.raises(UserError, match="has 15 bytes and needs 16"):
        read_secret(None)
    (tmp_path / "s").write_bytes(b"y" * 16 + b"\r\n")
    (tmp_path / "s").chmod(0o600)
    assert read_secret(tmp_path / "s") == b"y" * 16
    assert (read_bounds("4:8"), read_bounds("3")) == (Bounds(min=4, max=8), Bounds(min=3, max=3))


class Heard:
    """A control connection that notes who is written to."""

    def __init__(self, member, heard):
        self.member, self.heard = member, heard

    def write(self, body):
        self.heard.append(self.member)


def test_the_member_in_the_coordinators_process_hears_last():
    # else a commit could be known to that process alone, be lost with it, and be made anew with another result
    coordinator = Coordinator(b"s", own=1)
    membership, heard = coordinator.membership, []
    for _ in range(3):
        membership.join(JoinInfo(name="", addresses=(("h", 1),), facts={}, elects=True))
    membership.admit()
    for member in membership.people:
        coordinator._lines[member] = Heard(member, heard)
    for member in (1, 2, 3):
        coordinator._act(membership.vote(member, Vote(epoch=membership.world.epoch, step=0, digest="d")))
    coordinator._loop.close()
    assert heard == [2, 3, 1]
