"""Deadlines: whose silence is too long, who is stuck, which link stalls."""

import pytest

from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.membership.liveness import CoordinatorLiveness, MemberLiveness, silent, stalled, stuck
from heteromesh.faults.wire.deadlines import Intervals, Timing
from heteromesh.faults.wire.messages import Heartbeat


def test_deadline_follows_the_peer():
    timing = Timing()
    steady, jumpy = Intervals(0.2, timing), Intervals(0.2, timing)
    assert steady.deadline() == 0.2
    for index in range(64):
        steady.add(0.05)
        jumpy.add(0.05 if index % 2 else 0.3)
    assert steady.deadline() == 0.2
    assert 1.0 < jumpy.deadline() < 3.0


def test_silent_members_wait_for_each_other_but_not_for_long():
    """Those behind one broken link are lost at once, whatever the phase of their heartbeats."""
    timing = Timing(silence=1.0)
    pulses = {m: MemberLiveness(timing, 0.0) for m in (1, 2, 3)}
    for member, seen in ((1, 0.0), (2, 0.1), (3, 0.95)):
        pulses[member].beat(None, seen)
    assert silent(pulses, 1.05) == []  # 2 is late too
    assert silent(pulses, 1.15) == [1, 2]
    pulses[2].beat(None, 0.4)
    assert silent(pulses, 1.2) == []
    assert silent(pulses, 1.3) == [1]  # whoever is late for long has it to itself
    pulses[2].beat(None, 1.25)
    assert silent(pulses, 1.26) == [1]


def test_coordinator_that_says_nothing_hangs():
    answers = CoordinatorLiveness(Timing(), 0.0, 2.0)
    answers.heard(1.0)
    answers.compensate(-5.0)
    answers.check(2.9)
    answers.compensate(10.0)  # this process was stopped itself
    answers.check(12.9)
    with pytest.raises(TimeoutError, match=r"said nothing for 2\.1 s"):
        answers.check(13.1)


def test_silent_stuck_and_stalled():
    timing = Timing(silence=0.5, stuck=2.0)
    pulses = {m: MemberLiveness(timing, 0.0) for m in (1, 2, 3)}
    world = Epochs(members=[1, 2, 3], epoch=1)
    for member, waiting in ((1, (3,)), (2, (3,)), (3, ())):
        pulses[member].beat(Heartbeat(tick=1, waiting=waiting, waiting_in=1), 3.0)
    assert silent(pulses, 3.1) == []
    assert silent(pulses, 3.6) == [1, 2, 3]
    assert stuck(pulses, world, 4.0) == []
    assert stuck(pulses, world, 5.5) == [3]
    assert stalled(pulses, world, 5.5) == []
    pulses[3].beat(Heartbeat(tick=1, waiting=(1,), waiting_in=1), 5.5)
    assert stuck(pulses, world, 5.6) == []
    assert stalled(pulses, world, 5.6) == [(1, 3)]
    for pulse in pulses.values():
        pulse.compensate(2.0)
    assert stalled(pulses, world, 5.6) == []
