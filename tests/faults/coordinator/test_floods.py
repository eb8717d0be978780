"""A coordinator among strangers, and one whose members fall silent."""

import multiprocessing
import os
import resource
import signal
import socket
import time
from contextlib import ExitStack

import pytest
import torch
from members import job, wait_until

from heteromesh.errors import UserError
from heteromesh.faults.coordinator.main import read_secret
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.view import Finished, StateLost
from heteromesh.faults.wire.deadlines import Timing


def flooded(seconds):
    """Serves with 128 descriptors, floods itself from another process, and takes a member meanwhile."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    server = Coordinator(b"s").start()
    context = multiprocessing.get_context("fork")
    flood = context.Process(target=flood_of, args=(server.address, 1000))
    flood.start()
    try:
        wait_until(lambda: server.membership.counts["foreign"] > 50)
        member = Member(JoinOptions(coordinators=[server.address], secret=b"s", name="a", connect_seconds=seconds))
        steps = Steps(member.group())
        steps.start()
        assert steps.reduce([torch.ones(3)]).step == 0
        member.close()
        with open(os.devnull, "rb"):
            pass
    finally:
        flood.kill()
        flood.join()
        server.stop()


def flood_of(address, most):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[0],) * 2)
    while True:
        with ExitStack() as stack:
            for _ in range(most):
                try:
                    stack.enter_context(socket.create_connection(address, timeout=1))
                except OSError:
                    break


def test_a_flood_of_unproved_connections_ends_nobody(capfd):
    process = multiprocessing.get_context("fork").Process(target=flooded, args=(60,))
    process.start()
    process.join(150)
    assert process.exitcode == 0
    assert "Traceback" not in capfd.readouterr().err


def holder(address, name, pipe):
    """Makes steps until it is told to end; says when each is done."""
    member = Member(JoinOptions(coordinators=[address], secret=b"s", name=name))
    steps = Steps(member.group())
    steps.start()
    while not pipe.poll():
        steps.reduce([torch.ones(3)])
        time.sleep(0.01)
    pipe.send(steps.step)
    member.close()


def test_the_last_one_that_holds_the_state_is_waited_for_when_it_is_silent():
    """A process alone in its job is stopped for much longer than silence is allowed, and goes on."""
    server = Coordinator(b"s", timing=Timing(silence=0.2, patience=60)).start()
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=holder, args=(server.address, "a", theirs))
    process.start()
    try:
        wait_until(lambda: server.membership.world.committed > 3)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(process.pid, signal.SIGCONT)
        reached = server.membership.world.committed
        wait_until(lambda: server.membership.world.committed > reached + 3)
        assert server.membership.counts["silent"] == 0
        ours.send("end")
        assert ours.recv() > reached
    finally:
        process.kill()
        process.join()
        server.stop()


def test_when_nobody_holds_the_state_all_are_told_and_the_job_can_begin_again():
    with job(2) as (server, members, pool):
        steps = [Steps(member.group()) for member in members]
        list(pool.map(lambda s: s.start(), steps))
        steps[0]._group.end_job("nobody has a part of it")
        for member in members:
            with pytest.raises(StateLost, match="nobody has a part of it"):
                wait_until(lambda member=member: member.is_newest(-1))
        later = Member(JoinOptions(coordinators=[server.address], secret=b"s", name="c", step=5))
        again = Steps(later.group(), step=5)
        # the job needs two
        other = Member(JoinOptions(coordinators=[server.address], secret=b"s", name="d", step=5))
        both = [again, Steps(other.group(), step=5)]
        list(pool.map(lambda s: s.start(), both))
        assert [c.step for c in pool.map(lambda s: s.reduce([torch.ones(2)]), both)] == [5, 5]
        later.close()
        other.close()


def test_who_comes_after_the_end_begins_nothing():
    with job(1) as (server, members, _):
        steps = Steps(members[0].group())
        steps.start()
        late = Member(JoinOptions(coordinators=[server.address], secret=b"s", name="late"))
        members[0].close(finished=True)
        with pytest.raises(Finished):
            Steps(late.group()).start()
        later = Member(JoinOptions(coordinators=[server.address], secret=b"s", name="later"))
        with pytest.raises(Finished):
            Steps(later.group()).start()
        late.close()
        later.close()


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(b"y" * 16)
    file.chmod(0o640)
    with pytest.raises(UserError, match=r"can be read by other users \(mode 640\): .*chmod 600"):
        read_secret(file)
    file.chmod(0o600)
    assert read_secret(file) == b"y" * 16
