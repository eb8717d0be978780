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
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from heteromesh.faults.coordinator import Coordinator
from heteromesh.faults.deadlines import Timing
from heteromesh.faults.election import Election
from heteromesh.faults.member import Member, Terms
from heteromesh.faults.membership import WORLD, Applicant, Bounds, Membership
from heteromesh.faults.quorum import holds
from heteromesh.faults.serve import SECRET, main, read_bounds, read_secret
from heteromesh.faults.steps import Steps
from heteromesh.faults.view import view_of
from heteromesh.planner.errors import UserError

BASE = {"addresses": [["h", 1]], "facts": {}, "name": ""}


def applicant(elects=True):
    return Applicant(name="", addresses=(("h", 1),), facts={}, elects=elects)


def started(size, elects=True):
    """A job whose members all know the first epoch."""
    membership = Membership(Bounds())
    for _ in range(size):
        membership.join(applicant(elects))
    membership.admit()
    know(membership)
    return membership


def know(membership, *members):
    for member in members or membership.world.members:
        membership.knows(member, membership.world.epoch)


def report(membership, member, **changes):
    """What a member says that has heard of the coordinator's last epoch."""
    seat = {"committed": 0, "chain": "", "stale": False, **membership.world.config(), "bases": membership.bases}
    return {"kind": "rejoin", "member": member, "groups": {WORLD: {**seat, **changes}}, **BASE}


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[:2] for sock in sockets]


@pytest.mark.parametrize(
    ("there", "base", "wanted"),
    [
        ([1, 2], [1, 2, 3], True),
        ([1], [1, 2, 3], False),
        ([1, 4], [1, 2, 3, 4], True),
        ([2, 3], [1, 2, 3, 4], False),
        ([1], [1, 2], True),
        ([2], [1, 2], False),
        ([], [], True),
        ([1, 2, 9, 8], [1, 2, 3, 4, 5], False),
    ],
)
def test_more_than_half_or_half_with_the_lowest(there, base, wanted):
    assert holds(there, [base]) == wanted
    assert holds(there, [base, there]) == wanted


def test_a_coordinator_goes_on_while_it_has_a_quorum():
    membership = started(4)
    membership.lose(3, "silent")
    assert membership.outvoted() is None
    membership.lose(4, "silent")
    assert membership.outvoted() is None  # exactly half, with the lowest
    membership.lose(1, "silent")
    assert "members [2] are not the larger part of [1, 2, 3, 4]" in membership.outvoted()


def test_losses_that_the_others_have_heard_of_are_no_split():
    membership = started(6)
    for member in (1, 2, 3, 4, 5):
        membership.lose(member, "died")
        if len(membership.world.members) > 1:
            assert membership.outvoted() is None
            know(membership)
    assert membership.outvoted() is not None  # of 5 and 6 the higher is left
    membership = started(6)
    for member in (1, 2, 3, 4, 5):
        membership.lose(member, "left")
        assert membership.outvoted() is None


def test_half_of_the_members_without_the_lowest_is_outvoted_only_where_others_could_elect():
    for elects in (False, True):
        membership = started(4, elects)
        membership.lose(1, "silent")
        membership.lose(2, "silent")
        assert (membership.outvoted() is not None) == elects


def test_an_epoch_that_some_have_not_heard_of_does_not_count_alone():
    membership = started(5)
    membership.lose(1, "silent")
    know(membership, 2, 3)  # 4 and 5 have not said that they know of it
    membership.lose(2, "silent")
    membership.lose(3, "silent")
    assert membership.outvoted() is not None


def test_two_sides_never_go_on():
    """Random losses, joins and deliveries; then no election may succeed beside a coordinator that goes on."""
    both = elected = 0
    for seed in range(3000):
        dice = random.Random(seed)
        membership = started(dice.randint(2, 6))
        views = {m: report(membership, m) for m in membership.people}
        lost = []
        for _ in range(dice.randint(1, 8)):
            act = dice.random()
            if act < 0.5 and len(membership.people) > 1:
                member = dice.choice(sorted(membership.people))
                why = dice.choice(["silent", "silent", "silent", "left"])
                membership.lose(member, why)
                if why == "left":
                    views.pop(member, None)
                else:
                    lost.append(member)
            elif act < 0.7:
                membership.join(applicant())
                membership._grow(membership.waiting)
            if membership.outvoted():
                break
            for member in membership.world.members:
                if dice.random() < 0.6:
                    views[member] = report(membership, member)
                    if dice.random() < 0.7:
                        membership.knows(member, membership.world.epoch)
        election = Election()
        for member in {m for m in lost if m in views}:
            assert not isinstance(election.add(views[member]), str)
        elected += election.quorum()
        both += election.quorum() and membership.outvoted() is None
    assert both == 0
    assert elected > 100


def test_commit_that_only_some_have_heard_of_stands():
    election = Election()
    assert not election.quorum()
    for member, committed, stale in ((3, 6, False), (4, 5, True), (1, 5, False)):
        assert not election.complete()
        told = {"epoch": 2, "committed": committed, "chain": f"c{committed}", "stale": stale, "members": [1, 2, 3, 4]}
        assert not isinstance(election.add({"member": member, "groups": {"world": {**told, "bases": []}}, **BASE}), str)
        assert election.quorum() == (member == 1)
    membership = Membership(Bounds(), people=dict.fromkeys((1, 3, 4), applicant()))
    orders = election.conclude(membership)
    config = orders[0][1]
    assert [member for member, _ in orders] == [1, 3, 4]
    assert (config["epoch"], config["committed"], config["chain"], config["stale"]) == (3, 6, "c6", [4])
    assert config["bases"] == [[1, 2, 3, 4]]
    assert view_of(config, 3).bases == ((1, 2, 3, 4),)
    assert membership.join(applicant()) == 5
    # the old epoch's members have their say until all of the new one's have heard of it
    membership.lose(4, "silent")
    membership.lose(3, "silent")
    assert membership.outvoted() is not None


def test_strangers_do_not_vote():
    election = Election()
    for message in (
        {},
        {"member": 1, "addresses": [["h", 1]], "facts": {}},
        {"member": 1, "addresses": [["h", 1]], "facts": {}, "groups": {"world": {"epoch": "x"}}},
    ):
        assert "malformed" in election.add(message)
    older, newer = started(3), started(3)
    newer.lose(3, "silent")
    know(newer)
    for member in (3, 2):
        assert not isinstance(election.add(report(newer if member == 2 else older, member)), str)
    # the newest epoch that anyone knows has members 1 and 2
    assert not election.quorum()
    election.add(report(newer, 1))
    assert election.complete()
    membership = Membership(Bounds(), people=dict.fromkeys((1, 2, 3), applicant()))
    orders = election.conclude(membership)
    assert [(m, o["kind"]) for m, o in orders] == [(3, "fenced"), (1, "config"), (2, "config")]


@pytest.fixture
def jobs():
    """Makes members of a job with three addresses for its coordinator; ends them all."""
    with ExitStack() as stack:
        addresses, members = free_ports(3), []
        terms = Terms(coordinators=addresses, secret=b"s", name="")

        def make(size, least):
            host, port = addresses[0]
            timing = Timing(silence=10.0, heartbeat=0.02, gather=0.0 if least == size else 1.0)
            server = Coordinator(b"s", host=host, port=port, bounds=Bounds(least=least), timing=timing)
            stack.callback(server.start().stop)
            members.extend(Member(replace(terms, name=str(i))) for i in range(size))
            return server, members

        yield make
        for member in reversed(members):
            member.close()


def test_coordinator_is_lost_in_the_middle_of_steps(jobs):
    server, members = jobs(3, least=3)
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
        chains.append(members[index].committed("world"))

    with ThreadPoolExecutor(3) as pool:
        for wait in [pool.submit(act, index) for index in range(3)]:
            wait.result(30)
    assert len(set(chains)) == 1
    assert chains[0][0] == 300
    assert max(longest) < 5  # 0.1 s on a quiet machine


def test_who_waits_to_join_joins_the_next_coordinator(jobs):
    server, members = jobs(2, least=2)
    for member in members:
        member.await_view(WORLD, -1)
    waiting = Member(replace(members[0].terms, name="late"))
    with waiting._lock:
        assert waiting._seats[WORLD].view is None  # nobody makes steps, so nobody commits
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
    process = command("--host", "127.0.0.1", "--port", "0", "--secret-file", str(file), "--members", "1:2")
    try:
        host, port = process.stdout.readline().split()[-1].split(":")
        member = Member(Terms(coordinators=[(host, int(port))], secret=secret, name="a"))
        steps = Steps(member.group())
        steps.start()
        assert steps.reduce([torch.ones(3)]).step == 0
        member.close()
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_stand_alone_coordinator_on_a_taken_port_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = command("--host", "127.0.0.1", "--port", str(port), HETEROMESH_SECRET="s" * 16)
        _, error = process.communicate(timeout=60)
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
    assert read_secret(tmp_path / "s") == b"y" * 16
    assert (read_bounds("4:8"), read_bounds("3")) == (Bounds(least=4, most=8), Bounds(least=3, most=3))
