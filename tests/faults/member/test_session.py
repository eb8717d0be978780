"""Sessions: one commit a step in a fixed world; in an elastic one through losses and joins, with nothing left open."""

import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from members import job

from heteromesh.comm.session import Attempt, Fixed
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.faults.member.member import Member
from heteromesh.faults.member.session import Elastic
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.membership.view import StateLost
from heteromesh.faults.testing.oracle import Belongings
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.planner.ownership.ownership import LostState

VICTIM = """
import os, signal, sys
from heteromesh.comm.session import Attempt
from heteromesh.faults.member.member import Member, JoinOptions
from heteromesh.faults.member.session import Elastic

host, port = sys.argv[1:]
options = JoinOptions(coordinators=[(host, int(port))], secret=b"s", name="victim")
session = Elastic(Member(options), dict, lambda state: None)
session.start()

def attempt(world):
    ranks = world.gather(world.rank)
    if session.commits == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the others wait for its part of the sum
    world.gather(world.rank)
    return Attempt(ranks, str(ranks))

session.commits = 0
while True:
    session.commit(attempt)
    session.commits += 1
"""


class Adding:
    """Collectives with a thread that waits in the epoch's transport for what never comes, as an early sum does."""

    def __init__(self, world):
        self.ended = None
        self.thread = threading.Thread(target=self.wait, args=(world,), name="adding")
        self.thread.start()

    def wait(self, world):
        try:
            world.exchange.recv((world.rank + 1) % world.size, torch.empty(1), 99).wait()
        except GroupAborted as error:
            self.ended = error

    def close(self):
        self.thread.join(150)
        assert not self.thread.is_alive()


def test_fixed_world_makes_each_attempt_once():
    session, heard = Fixed(World()), []
    world = session.start()
    for number in (1, 2):
        done = session.commit(lambda world: Attempt(world.size, "d"), heard.append)
        assert (done.result, done.digest, done.attempts, done.number) == (1, "d", 1, number)
        assert done.world is world
    with session.busy():
        session.close()
    assert heard == [1, 1]


def test_member_killed_in_the_middle_of_an_attempt():
    """The survivors make the attempt again without it, in a new world, and no thread of the old one's waits on."""
    before = Belongings.now()
    with job(2, Timing(silence=20), Bounds(min=2, max=3)) as (server, members, pool):
        opened = []

        def collectives(world):
            opened.append(Adding(world))
            return opened[-1]

        sessions = [Elastic(m, dict, lambda state: None, collectives=collectives) for m in members]
        firsts = [pool.submit(session.start) for session in sessions]
        assert [first.result(20).size for first in firsts] == [2, 2]
        command = [sys.executable, "-c", VICTIM, *map(str, server.address)]
        with subprocess.Popen(command) as victim:

            def train(session):
                seen = []
                while True:

                    def attempt(world):
                        world.collectives  # noqa: B018 (opens them)
                        seen.append((world, world.fresh))
                        ranks = world.gather(world.rank)
                        world.gather(world.rank)
                        return Attempt(ranks, str(ranks))

                    done = session.commit(attempt)
                    if any(world.size == 3 for world, _ in seen) and done.world.size == 2:
                        return seen, done

            for seen, done in [wait.result(60) for wait in [pool.submit(train, s) for s in sessions]]:
                assert done.result == [0, 1]
                assert done.attempts == 2
                assert seen[0][1]  # nothing was committed yet
                three = [(world, fresh) for world, fresh in seen if world.size == 3]
                assert [fresh for _, fresh in three] == [False, True, True]
                assert len({id(world) for world, _ in three}) == 1
                assert not seen[-1][1]
                with pytest.raises(GroupAborted, match="is over"):
                    three[0][0].collectives  # noqa: B018
            assert victim.wait(150) == -signal.SIGKILL
        for session in sessions:
            session.close()
        assert len(opened) == 2 * 3
        assert all(adding.ended for adding in opened)
    assert Belongings.now().left_over(before) == []


def test_joiner_has_the_state_before_its_first_attempt():
    with job(1, bounds=Bounds(min=1, max=2)) as (_, members, pool):
        state = {"steps": 0, "values": torch.arange(3.0)}

        def train():
            session = Elastic(members[0], lambda: state, lambda state: None)
            session.start()
            while True:
                done = session.commit(lambda world: Attempt(world.sum(torch.ones(2)).tolist(), "same"))
                state["steps"] = done.number
                if done.world.size == 2:
                    return done

        wait = pool.submit(train)
        adopted = {}
        member = Member(replace(members[0].options, name="new"))
        session = Elastic(member, lambda: state, adopted.update, step=0)
        world = session.start()
        assert (world.members, world.names) == ((members[0].id, member.id), ("0", "new"))
        assert adopted["steps"] > 0
        assert torch.equal(adopted["values"], state["values"])
        heard = []
        done = session.commit(lambda world: Attempt(world.sum(torch.ones(2)).tolist(), "same"), heard.append)
        assert done.result == [2.0, 2.0]
        assert heard == [done.result]
        assert done.number == adopted["steps"] + 1
        assert wait.result(20).number == done.number
        session.close()


def test_world_sums_and_sends_with_equal_results():
    with job(3) as (_, members, pool):

        def attempt(world):
            values = world.sum(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64) * (world.rank + 1))
            with pytest.raises(ZeroDivisionError):
                world.once(lambda: 1 / 0)
            told = (values.tolist(), world.broadcast([world.rank, "text"]), world.once(lambda: world.members))
            world.barrier()
            return Attempt((told, world.gather("x" * world.rank)), str(told))

        def act(member):
            session = Elastic(member, dict, lambda state: None)
            session.start()
            with session.busy():
                return session.commit(attempt)

        done = list(pool.map(act, members))
        assert len({str(d.result) for d in done}) == 1
        assert done[0].result[0][1:] == ([0, "text"], tuple(m.id for m in members))
        assert done[0].result[1] == ["", "x", "xx"]
        assert done[0].result[0][0] == pytest.approx([0.6, 1.2, 1.8])


def test_state_that_nobody_has_ends_the_job_for_all():
    with job(2) as (_, members, pool):

        def act(member):
            session = Elastic(member, dict, lambda state: None)
            session.start()

            def attempt(world):
                if world.rank == 0:
                    raise LostState("owner and mirror are lost")
                return Attempt(world.gather(0), "")

            while True:
                session.commit(attempt)

        for wait in [pool.submit(act, member) for member in members]:
            with pytest.raises(StateLost, match="owner and mirror are lost"):
                wait.result(20)
