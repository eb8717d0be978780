"""Jobs of real processes under kills, stops, cuts and joins; isolation of groups; the checkers themselves."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from members import job

from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.death_notice import Lease, Watcher
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.view import Fenced, Stopped
from heteromesh.faults.testing import inject, oracle
from heteromesh.faults.testing.lab import Lab, LabWork
from heteromesh.faults.testing.oracle import Belongings, CommitEvent, History
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.faults.wire.messages import MemberDied


@pytest.mark.parametrize("collectives", [False, True])
def test_kills_stops_and_joins(collectives):
    with Lab(LabWork(bytes=1 << 18, collectives=collectives), size=4, timing=Timing(silence=2.0)) as lab:
        for fault in inject.schedule(3, 5, kinds=("kill", "kill", "stop"), slots=4):
            lab.pump(fault.delay)
            victim = lab.workers[fault.slot % len(lab.workers)]
            act = inject.kill if fault.kind == "kill" else inject.stop
            assert lab.recovery(victim, act(victim.process.pid)) is not None, lab.describe()
            if fault.kind == "stop":
                inject.resume(victim.process.pid)
                assert lab.until(lambda victim=victim: victim.ended.startswith("Fenced"), 10), victim.ended
            lab.add(victim.slot)
            lab.settle()
        assert lab.history().faults() == []
        assert not any(worker.ended for worker in lab.workers)
        # survivors never lost a step, and some redid the sum of one
        assert max(event.attempts for event in lab.history().events) > 1


def test_coordinators_process_is_killed():
    """Nobody is lost with it, no step either: the next one is another coordinator's."""
    with Lab(LabWork(bytes=1 << 18), size=3, timing=Timing(silence=2.0), elective=True) as lab:
        lab.pump(0.2)
        assert lab.interruption(inject.kill(lab.coordinator)) is not None, lab.describe()
        lab.pump(0.2)
        assert lab.history().faults() == []
        assert not any(worker.ended for worker in lab.workers)
        assert len(lab.workers) == 3


def test_the_commits_round_trip_is_hidden_behind_work_on_the_result():
    with job(2) as (_, members, pool):
        committed = threading.Event()
        heard = []

        def act(index):
            steps = Steps(members[index].group())
            steps.start()

            def body(group):
                return steps.sum(group, [torch.ones(3)]), "the same"

            def overlap(summed):
                heard.append(summed.sums[0].tolist())
                # the other has its commit although this one is still at work on the result
                assert index == 1 or committed.wait(150)

            steps.atomic(body, overlap)
            committed.set()

        for wait in [pool.submit(act, index) for index in range(2)]:
            wait.result(20)
        assert heard == [[2.0, 2.0, 2.0]] * 2


def test_survivors_inputs_are_kept_and_summed_again():
    with job(3) as (_, members, pool):
        inputs = [torch.full((100_000,), float(10**i)) for i in range(3)]
        leave = threading.Event()

        def act(index):
            steps = Steps(members[index].group())
            steps.start()
            steps.reduce([inputs[index]])
            if index == 1:
                leave.wait()
                raise_away(steps)
                return None
            return steps.reduce([inputs[index], torch.ones(3)])

        waits = [pool.submit(act, index) for index in range(3)]
        time.sleep(0.1)
        members[0]._control.send(MemberDied(members[1].id))
        # too few for the minimum now: a fourth member makes it three again
        fourth = Member(replace(members[0].options, name="3"))
        steps = Steps(fourth.group())
        steps.start()
        assert steps.step == 1
        last = steps.reduce([torch.zeros(100_000), torch.zeros(3)], contributes=False)
        leave.set()
        for index in (0, 2):
            commit = waits[index].result(10)
            assert set(commit.contributors) == {members[0].id, members[2].id}
            assert bool((commit.sums[0] == 101).all())
            assert bool((commit.sums[1] == 2).all())
            assert commit.digest == last.digest
        assert bool((inputs[0] == 1).all())
        with pytest.raises(Fenced):
            waits[1].result(10)
        fourth.close()


def raise_away(steps):
    """A member that has been put out must hear of it at its next step."""
    steps.reduce([torch.ones(100_000), torch.ones(3)])


def test_failure_in_one_group_leaves_the_others_untouched():
    """Two jobs in one process, each a group of its own, with the same member ids and epochs."""
    with job(2) as (_, left, one), job(2) as (_, right, two):
        members, pools = [*left, *right], [one, one, two, two]
        groups = [member.group() for member in members]

        def everywhere(act):
            waits = [pool.submit(act, index) for index, pool in enumerate(pools)]
            return [wait.result(20) for wait in waits]

        everywhere(lambda index: groups[index].ready())
        epoch = groups[2].view.epoch
        inject.cut(groups[0].transport, 1)

        def act(index):
            values = torch.full((50_000,), float(index))
            try:
                groups[index].all_reduce(values)
            except GroupAborted:
                assert bool((values == index).all())  # an in-place sum that failed has kept its input
                groups[index].ready()
                groups[index].all_reduce(values)
                return float(values[0]), True
            return float(values[0]), False

        assert everywhere(act) == [(1.0, True), (1.0, True), (5.0, False), (5.0, False)]
        assert groups[2].view.epoch == epoch
        assert groups[0].view.epoch > 1


def test_joiner_gets_the_state_and_a_member_with_other_shapes_does_not():
    with job(1) as (_, members, pool):
        values = [torch.arange(5.0), torch.tensor([7])]
        first = Steps(members[0].group(), lambda: values)
        first.start()
        running = threading.Event()

        def train():
            while not running.is_set():
                first.reduce([torch.ones(10)])
                values[1] += 1

        wait = pool.submit(train)
        joiner = Member(replace(members[0].options, name="new"))
        copy = [torch.zeros(5), torch.tensor([0])]
        steps = Steps(joiner.group(), lambda: copy)
        steps.start()
        assert torch.equal(copy[0], values[0])
        assert int(copy[1]) == 7 + steps.step
        running.set()
        steps.reduce([torch.ones(10)])
        joiner.close()
        wait.result(10)


def test_stuck_main_thread_is_put_out():
    with job(2, Timing(silence=5, stuck=0.3, patience=0.1)) as (server, members, pool):
        steps = [Steps(member.group()) for member in members]
        list(pool.map(lambda s: s.start(), steps))
        wait = pool.submit(steps[0].reduce, [torch.ones(10)])
        # member 2 beats, but its main thread never comes to the sum
        with pytest.raises(Stopped, match="1 members are left"):
            wait.result(10)
        assert server.membership.counts["stuck"] == 1
        with pytest.raises(Fenced, match="stuck"):
            steps[1].reduce([torch.ones(10)])


def test_lost_coordinator_ends_every_wait():
    server = Coordinator(b"s").start()
    member = Member(JoinOptions(coordinators=[server.address], secret=b"s", name="a"))
    group = member.group()
    group.ready()
    server.stop()
    with pytest.raises(Fenced, match="lost the coordinator"):
        spin(group.ready)
    member.close()


def spin(act):
    while True:
        act()


def test_nothing_is_left_over():
    before = Belongings.now()
    with job(3) as (_, members, pool):
        steps = [Steps(member.group()) for member in members]
        list(pool.map(lambda s: s.start(), steps))
        list(pool.map(lambda s: s.reduce([torch.ones(100)]), steps))
        assert Belongings.now().left_over(before)
    assert Belongings.now().left_over(before) == []


def test_lease_tells_of_its_holder():
    lease, told = Lease(), threading.Event()
    watcher = Watcher(lease.path, told.set)
    assert not told.wait(0.05)
    lease.close()
    assert told.wait(150)
    watcher.join()
    lease, told = Lease(), threading.Event()
    unwanted = Watcher(lease.path, told.set)
    unwanted.stop()
    unwanted.join()
    lease.close()
    assert not told.is_set()
    foreign = Lease()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(foreign.close).result()
    del foreign
    Lease().close()  # the owner's list of robust mutexes is still whole
    with pytest.raises(OSError, match="No such file"):
        Watcher("/proc/self/fd/9999", told.set)


def test_schedules_are_seeded():
    assert inject.schedule(5, 20) == inject.schedule(5, 20) != inject.schedule(6, 20)
    with pytest.raises(ValueError, match="kill, stop, cut, hold"):
        inject.schedule(0, 1, kinds=("explode",))


def event(member, step, **changes):
    values = {"slot": 0, "time": float(step), "epoch": 1, "digest": "d", "chain": "c", "right": True, "attempts": 1}
    return CommitEvent(member=member, step=step, slots=(0,), **{**values, **changes})


def test_history_finds_what_is_wrong():
    good = [event(m, s, chain=f"c{s}") for m in (1, 2) for s in range(3)]
    assert History(good).faults() == []
    assert History(good).longest_stall() == 1.0
    for extra, text in (
        (event(3, 3, right=False), "wrong sum: member 3 in step 3"),
        (event(3, 2, digest="x", chain="c2"), "step 2 was committed with 2 results"),
        (event(3, 2, epoch=2, chain="c2"), "step 2 was committed with 2 results"),
        (event(3, 2, chain="x"), "step 2 was committed with 2 results"),
        (event(2, 2, chain="c2"), "member 2 committed steps out of order"),
        (event(3, 4), "a step number is missing"),
    ):
        assert any(text in fault for fault in History([*good, extra]).faults()), text


def test_digits_tell_missing_double_and_stale_contributions():
    count = 5000
    parts = [oracle.contribution(slot, 3, count) for slot in range(8)]
    assert torch.equal(sum(parts), oracle.expected(range(8), 3, count))
    assert not torch.equal(sum(parts[1:]), oracle.expected(range(8), 3, count))
    assert not torch.equal(sum(parts) + parts[2], oracle.expected(range(8), 3, count))
    assert not torch.equal(sum(parts), oracle.expected(range(8), 4, count))
