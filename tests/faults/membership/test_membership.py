"""Membership: who is in, what is committed, who is put out; and the control connection's seals."""

import json
import socket
import struct
import time

import pytest

from heteromesh.comm.tcp.auth import ANSWER_HEAD, Acceptor, Connector
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.member import Member, Terms
from heteromesh.faults.membership.deadlines import Intervals, Timing
from heteromesh.faults.membership.epochs import Epochs
from heteromesh.faults.membership.liveness import Answers, Pulse, silent, stalled, stuck
from heteromesh.faults.membership.membership import WORLD, Applicant, Bounds, Membership
from heteromesh.faults.membership.view import Stopped
from heteromesh.faults.wire.control import connect
from heteromesh.faults.wire.messages import MAX_MESSAGE, Wire, WireError

FACTS = {"version": "1", "model": "m", "plan": "p"}


def applicant(name="a", **changes):
    values = {"name": name, "addresses": (("127.0.0.1", 1),), "facts": FACTS, **changes}
    return Applicant(**values)


def started(size, least=1, most=256, **changes):
    membership = Membership(Bounds(least=least, most=most))
    for index in range(size):
        membership.join(applicant(str(index), **changes))
    return membership, membership.admit()


def fin(membership, member, digest="d", group=WORLD):
    epochs = membership.groups[group]
    return membership.finish(
        member, {"group": group, "epoch": epochs.epoch, "step": epochs.committed, "digest": digest}
    )


def kinds(orders):
    return [(member, message["kind"]) for member, message in orders]


def test_starts_with_the_minimum():
    membership = Membership(Bounds(least=2))
    membership.join(applicant())
    assert membership.admit() == []
    membership.join(applicant())
    orders = membership.admit()
    assert kinds(orders) == [(1, "config"), (2, "config")]
    assert orders[0][1]["stale"] == []


def test_commit_needs_every_member():
    membership, _ = started(3)
    assert fin(membership, 1) == fin(membership, 3) == []
    orders = fin(membership, 2)
    assert kinds(orders) == [(1, "commit"), (2, "commit"), (3, "commit")]
    assert membership.world.committed == 1


def test_join_rides_on_a_commit_and_is_stale():
    membership, _ = started(2)
    assert membership.join(applicant()) == 3
    assert membership.admit() == []
    fin(membership, 1)
    orders = fin(membership, 2)
    assert kinds(orders)[2:] == [(1, "config"), (2, "config"), (3, "config")]
    assert orders[-1][1]["stale"] == [3]
    # a stale member cannot finish a step; an aborted copy leaves it stale (bug a)
    fin(membership, 1)
    fin(membership, 2)
    assert fin(membership, 3) == []
    membership.healed(3, {"group": WORLD, "epoch": membership.world.epoch, "step": 0})
    assert membership.world.config()["stale"] == [3]
    membership.healed(3, {"group": WORLD, "epoch": membership.world.epoch, "step": 1})
    assert kinds(fin(membership, 3))[0] == (1, "commit")


def test_loss_drops_what_was_finished_and_keeps_what_was_committed():
    membership, _ = started(3)
    for member in (1, 2, 3):
        fin(membership, member)
    fin(membership, 1)
    epoch = membership.world.epoch
    orders = membership.lose(2, "died")
    assert kinds(orders) == [(2, "fenced"), (1, "config"), (3, "config")]
    assert (membership.world.epoch, membership.world.committed, membership.world.fins) == (epoch + 1, 1, {})
    # a late fin of the old epoch counts for nothing
    assert membership.finish(3, {"group": WORLD, "epoch": epoch, "step": 1, "digest": "d"}) == []
    assert not membership.world.fins
    assert membership.lose(2, "died") == []


def test_different_digests_are_not_committed():
    membership, _ = started(3)
    for _ in range(3):
        epoch = membership.world.epoch
        fin(membership, 1), fin(membership, 2)
        assert kinds(fin(membership, 3, "other"))[0] == (1, "config")
        assert membership.world.epoch == epoch + 1
        assert membership.world.committed == 0
    fin(membership, 1), fin(membership, 2)
    orders = fin(membership, 3, "other")
    assert kinds(orders)[0] == (3, "fenced")
    assert membership.counts["divergences"] == 4


def test_other_groups_are_left_untouched():
    membership, _ = started(4)
    for name, members in (("left", [1, 2]), ("right", [3, 4])):
        for member in members:
            orders = membership.declare(member, {"group": name, "members": members})
        assert kinds(orders) == [(m, "config") for m in members]
    before = (membership.groups["right"].epoch, list(membership.groups["right"].members))
    fin(membership, 3, group="right")
    orders = membership.lose(1, "died")
    assert {m["group"] for _, m in orders if m["kind"] == "config"} == {WORLD, "left"}
    right = membership.groups["right"]
    assert (right.epoch, right.members) == before
    assert kinds(fin(membership, 4, group="right")) == [(3, "commit"), (4, "commit")]


def test_group_starts_only_when_all_say_the_same():
    membership, _ = started(2)
    assert membership.declare(1, {"group": "g", "members": [1, 2]}) == []
    assert membership.declare(2, {"group": "g", "members": [2, 1]}) == []
    assert len(membership.declare(2, {"group": "g", "members": [1, 2]})) == 2


def test_fewer_than_the_minimum_wait():
    membership, _ = started(2, least=2)
    assert kinds(membership.lose(2, "died")) == [(2, "fenced"), (1, "short")]
    membership.join(applicant())
    assert kinds(membership.admit()) == [(1, "config"), (3, "config")]


def test_more_than_the_maximum_are_spares():
    membership, orders = started(3, most=2)
    assert kinds(orders) == [(1, "config"), (2, "config")]
    fin(membership, 1)
    assert kinds(fin(membership, 2)) == [(1, "commit"), (2, "commit")]
    membership.lose(1, "died")
    assert kinds(fin(membership, 2))[-1] == (3, "config")


def test_members_with_an_older_state_are_healed_by_one_with_the_newest():
    membership = Membership(Bounds(least=3))
    for step, state in ((4, "x"), (6, "y"), (6, "z")):
        membership.join(applicant(step=step, state=state))
    config = membership.admit()[0][1]
    assert (config["committed"], config["stale"]) == (6, [1, 3])


def test_job_whose_state_nobody_holds_is_over():
    membership, _ = started(1)
    membership.join(applicant())
    fin(membership, 1)
    assert membership.lost_state() is None
    membership.lose(1, "died")
    assert "checkpoint" in membership.lost_state()


def test_repeated_link_failures_evict_the_one_named_most():
    membership, _ = started(3)
    for member in (1, 2, 1, 2):
        orders = membership.failed(
            member, {"group": WORLD, "epoch": membership.world.epoch, "peer": 3, "reason": "reset"}
        )
    assert (3, "fenced") in kinds(orders)
    assert membership.world.members == [1, 2]


def test_blocked_ports_are_named_from_where_to_where():
    """The second member's host cannot reach the first's; both live."""
    membership = Membership(Bounds())
    for name, host, port in (("a:0", "10.0.0.1", 4001), ("b:0", "10.0.0.2", 4002), ("c:0", "10.0.0.3", 4003)):
        membership.join(applicant(name, addresses=((host, port),)))
    membership.admit()
    for _ in range(4):
        told = {"group": WORLD, "epoch": membership.world.epoch, "peer": 1, "reason": "refused"}
        orders = membership.failed(2, told)
    fenced = [(member, message["reason"]) for member, message in orders if message["kind"] == "fenced"]
    assert fenced == [(2, "unreachable: no data from b:0 (10.0.0.2) to a:0 (10.0.0.1:4001)")]
    assert membership.world.members == [1, 3]
    # whoever is gone is blamed no more
    membership.failed(3, {"group": WORLD, "epoch": membership.world.epoch, "peer": 3, "reason": "itself"})
    membership.failed(3, {"group": WORLD, "epoch": membership.world.epoch, "peer": 2, "reason": "gone"})
    assert not membership.world.blamed


def test_refusal_names_the_difference():
    membership, _ = started(1)
    reason = membership.join(applicant(facts={**FACTS, "plan": "q", "extra": "e"}))
    assert reason == (
        "this process does not belong to the job: extra is e, the job's is missing; plan is q, the job's is p"
    )
    assert membership.people.keys() == {1}


@pytest.mark.parametrize("message", [{}, {"addresses": 1, "facts": {}}, {"addresses": [], "facts": {}}])
def test_malformed_join(message):
    assert Applicant.read({"kind": "join", **message}) is None


@pytest.mark.parametrize(("least", "most"), [(0, 1), (3, 2), (1, 257)])
def test_bad_bounds(least, most):
    with pytest.raises(ValueError, match="MIN <= MAX"):
        Bounds(least=least, most=most)


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
    pulses = {m: Pulse(timing, 0.0) for m in (1, 2, 3)}
    for member, seen in ((1, 0.0), (2, 0.1), (3, 0.95)):
        pulses[member].beat({}, seen)
    assert silent(pulses, 1.05) == []  # 2 is late too
    assert silent(pulses, 1.15) == [1, 2]
    pulses[2].beat({}, 0.4)
    assert silent(pulses, 1.2) == []
    assert silent(pulses, 1.3) == [1]  # whoever is late for long has it to itself
    pulses[2].beat({}, 1.25)
    assert silent(pulses, 1.26) == [1]


def test_coordinator_that_says_nothing_hangs():
    answers = Answers(Timing(hang=2.0), 0.0)
    answers.came(1.0)
    answers.forgive(-5.0)
    answers.check(2.9)
    answers.forgive(10.0)  # this process was stopped itself
    answers.check(12.9)
    with pytest.raises(TimeoutError, match=r"said nothing for 2\.1 s"):
        answers.check(13.1)


def test_silent_stuck_and_stalled():
    timing = Timing(silence=0.5, stuck=2.0)
    pulses = {m: Pulse(timing, 0.0) for m in (1, 2, 3)}
    group = Epochs(WORLD, members=[1, 2, 3], epoch=1)
    for member, blocked in ((1, {WORLD: [1, [3]]}), (2, {WORLD: [1, [3]]}), (3, {})):
        pulses[member].beat({"tick": 1, "blocked": blocked}, 3.0)
    assert silent(pulses, 3.1) == []
    assert silent(pulses, 3.6) == [1, 2, 3]
    assert stuck(pulses, {WORLD: group}, 4.0) == []
    assert stuck(pulses, {WORLD: group}, 5.5) == [3]
    assert stalled(pulses, group, 5.5) == []
    pulses[3].beat({"tick": 1, "blocked": {WORLD: [1, [1]]}}, 5.5)
    assert stuck(pulses, {WORLD: group}, 5.6) == []
    assert stalled(pulses, group, 5.6) == [(1, 3)]
    for pulse in pulses.values():
        pulse.forgive(2.0)
    assert stalled(pulses, group, 5.6) == []


def test_wire_in_any_pieces():
    member, coordinator = Wire(b"k", "member"), Wire(b"k", "coordinator")
    data = member.pack({"kind": "a"}) + member.pack({"kind": "b", "n": 1})
    got = [m for i in range(len(data)) for m in coordinator.feed(data[i : i + 1])]
    assert got == [{"kind": "a"}, {"kind": "b", "n": 1}]


def test_replayed_reflected_changed_and_foreign_messages():
    member = Wire(b"k", "member")
    first = member.pack({"kind": "a"})
    fresh = lambda: Wire(b"k", "coordinator")  # noqa: E731
    replayed = fresh()
    replayed.feed(first)
    with pytest.raises(WireError, match="foreign"):
        replayed.feed(first)
    with pytest.raises(WireError, match="foreign"):
        fresh().feed(member.pack({"kind": "second"}))
    with pytest.raises(WireError, match="foreign"):
        Wire(b"k", "member").feed(first)
    with pytest.raises(WireError, match="foreign"):
        Wire(b"other session", "coordinator").feed(first)
    with pytest.raises(WireError, match="foreign"):
        fresh().feed(first[:-1] + bytes([first[-1] ^ 1]))
    with pytest.raises(WireError, match="longer"):
        fresh().feed(struct.pack("!I", MAX_MESSAGE + 1))


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"kind":1}', b"\xff"])
def test_sealed_nonsense(body, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *_, **__: body.decode("latin1"))
    data = Wire(b"k", "member").pack({"kind": "x"})
    with pytest.raises(WireError):
        Wire(b"k", "coordinator").feed(data)


@pytest.fixture
def coordinator():
    server = Coordinator(b"secret", timing=Timing(patience=0.2, silence=5.0)).start()
    yield server
    server.stop()


def terms(server, secret=b"secret", **changes):
    return Terms(coordinators=[server.address], secret=secret, name="n", **{"facts": FACTS, **changes})


def test_wrong_secret_is_refused_and_counted(coordinator):
    with pytest.raises(ConnectionError, match="secrets differ"):
        Member(terms(coordinator, b"wrong"))
    until(lambda: coordinator.membership.counts["foreign"] == 1)
    assert not coordinator.membership.people


def test_other_model_plan_or_version_is_refused_by_name(coordinator):
    member = Member(terms(coordinator))
    for fact, value in FACTS.items():
        with pytest.raises(UserError, match=f"{fact} is other, the job's is {value}"):
            Member(terms(coordinator, facts={**FACTS, fact: "other"}))
    member.close()


def test_replayed_join_is_refused(coordinator):
    """Everything a member has sent, recorded and sent again on a new connection."""
    with socket.create_connection(coordinator.address) as sock:
        hello = sock.recv(100)
        connector = Connector(b"secret", b"member")
        answer = connector.answer(hello)
        sock.sendall(answer)
        join = Wire(connector.session, "member").pack({"kind": "join", "addresses": [["h", 1]], "facts": {}})
        sock.recv(100)
        sock.sendall(join)
        assert sock.recv(1000)
    joined = coordinator.membership.counts["joined"]
    with socket.create_connection(coordinator.address) as sock:
        sock.recv(100)
        sock.sendall(answer + join)
        assert sock.recv(100) == b""
    assert coordinator.membership.counts["joined"] == joined == 1
    until(lambda: coordinator.membership.counts["foreign"] == 1)


def test_two_jobs_on_one_port(coordinator):
    with pytest.raises(UserError, match=f":{coordinator.address[1]} .*port of its own"):
        Coordinator(b"other", port=coordinator.address[1]).start()


def test_no_coordinator_names_every_address():
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 .*127\.0\.0\.1:2 "):
        connect([("127.0.0.1", 1), ("127.0.0.1", 2)], b"s", seconds=1)


def test_too_few_members_for_too_long_end_the_job():
    server = Coordinator(b"secret", bounds=Bounds(least=2), timing=Timing(patience=0.5, silence=5.0)).start()
    members = [Member(terms(server)) for _ in range(2)]
    group = members[0].group()
    seat = members[0].await_view(WORLD, -1)
    assert server.short_seconds is None
    members[1].close()
    until(lambda: server.short_seconds is not None)
    assert 0 <= server.short_seconds <= 0.5
    seat[1].close()
    with pytest.raises(Stopped, match="1 members are left and the job needs 2"):
        group.ready()
    members[0].close()
    server.stop()


def test_acceptor_refuses_long_claims():
    with pytest.raises(ConnectionError, match="longer"):
        Acceptor(b"s").rest(b"x" * (ANSWER_HEAD - 2) + b"\xff\xff")


def until(true, seconds=5.0):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)
