"""Membership: who is in, what is committed, who is put out; and the control connection's seals."""

import json
import socket
import struct
import time

import pytest

from heteromesh.comm.tcp.auth import ANSWER_HEAD, Acceptor, Connector
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds, Membership
from heteromesh.faults.membership.view import Finished, Stopped, stop_of, view_of
from heteromesh.faults.wire.codec import MAX_MESSAGE, Wire, WireError, decode, encode
from heteromesh.faults.wire.control import connect
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.faults.wire.messages import (
    FINISHED,
    Alive,
    CommitNotice,
    Evicted,
    Healed,
    Heartbeat,
    JobStopped,
    Join,
    JoinInfo,
    Leave,
    LinkFailed,
    Malformed,
    MemberDied,
    NewEpoch,
    Refused,
    TooFew,
    Vote,
    Welcome,
)

FACTS = {"version": "1", "model": "m", "plan": "p"}


def info(name="a", **changes):
    values = {"name": name, "addresses": (("127.0.0.1", 1),), "facts": FACTS, **changes}
    return JoinInfo(**values)


def started(size, fewest=1, most=256, **changes):
    membership = Membership(Bounds(min=fewest, max=most))
    for index in range(size):
        membership.join(info(str(index), **changes))
    return membership, membership.admit()


def vote(membership, member, digest="d"):
    world = membership.world
    return membership.vote(member, Vote(epoch=world.epoch, step=world.committed, digest=digest))


def kinds(orders):
    return [(member, type(message)) for member, message in orders]


def test_starts_with_the_minimum():
    membership = Membership(Bounds(min=2))
    membership.join(info())
    assert membership.admit() == []
    membership.join(info())
    orders = membership.admit()
    assert kinds(orders) == [(1, NewEpoch), (2, NewEpoch)]
    assert orders[0][1].stale == ()


def test_those_without_whom_nobody_holds_the_state_are_known():
    membership, _ = started(2)
    membership.join(info(step=0))
    assert membership.last_holders([1]) == set()
    assert membership.last_holders([1, 2]) == {1, 2}
    for member in (1, 2):
        vote(membership, member)
    membership.lose(1, "died")
    assert membership.world.members == [2, 3]
    assert membership.last_holders([2]) == {2}
    assert membership.last_holders([3]) == set()
    assert membership.lost_state() is None
    membership.lose(2, "silent")
    assert "no member holds the state after step 1" in membership.lost_state()


@pytest.mark.parametrize("elects", [False, True])
def test_after_the_loss_of_the_state_those_who_come_begin_with_what_they_bring(elects):
    membership, _ = started(2, elects=elects)
    membership.end()
    membership.join(info(step=7, elects=elects))
    orders = membership.admit()
    assert kinds(orders) == [(3, NewEpoch)]
    assert (orders[0][1].committed, orders[0][1].stale) == (7, ())
    assert membership.lost_quorum() is None


def test_who_joins_when_all_is_done_is_told_so():
    membership, _ = started(2)
    membership.join(info())
    membership.finished = True
    assert membership.admit() == []
    membership.lose(1, "left")
    orders = membership.lose(2, "left")
    assert orders[-1] == (3, JobStopped("all steps of the job are done", FINISHED))
    membership.join(info())
    assert membership.admit()[-1] == (4, JobStopped("all steps of the job are done", FINISHED))
    assert isinstance(stop_of(orders[-1][1]), Finished)


def test_commit_needs_every_member():
    membership, _ = started(3)
    assert vote(membership, 1) == vote(membership, 3) == []
    orders = vote(membership, 2)
    assert kinds(orders) == [(1, CommitNotice), (2, CommitNotice), (3, CommitNotice)]
    assert membership.world.committed == 1


def test_join_rides_on_a_commit_and_is_stale():
    membership, _ = started(2)
    assert membership.join(info()) == 3
    assert membership.admit() == []
    vote(membership, 1)
    orders = vote(membership, 2)
    assert kinds(orders)[2:] == [(1, NewEpoch), (2, NewEpoch), (3, NewEpoch)]
    assert orders[-1][1].stale == (3,)
    # a stale member cannot finish a step; an aborted copy leaves it stale (bug a)
    vote(membership, 1)
    vote(membership, 2)
    assert vote(membership, 3) == []
    membership.healed(3, Healed(epoch=membership.world.epoch, step=0))
    assert membership.world.announcement().stale == (3,)
    membership.healed(3, Healed(epoch=membership.world.epoch, step=1))
    assert kinds(vote(membership, 3))[0] == (1, CommitNotice)


def test_ranks_are_in_the_order_of_places_and_the_longest_there_writes():
    membership = Membership(Bounds(min=2))
    for name, place in (("c", 2), ("a", 0)):
        membership.join(info(name, place=place))
    orders = membership.admit()
    assert orders[0][1].members == (2, 1), "not in the order of arrival"
    assert [membership.join(info(name, place=place)) for name, place in (("b", 1), ("d", None))] == [3, 4]
    vote(membership, 1)
    assert vote(membership, 2)[-1][1].members == (2, 3, 1, 4), "who does not know its place comes last"
    membership.lose(2, "died")
    membership.join(info("a", place=0))
    for member in (3, 4):
        membership.world.current.add(member)
    orders = [order for member in (3, 1, 4) for order in vote(membership, member)]
    assert orders[-1][1].members == (5, 3, 1, 4)
    assert orders[-1][1].stale == (5,)
    view = view_of(orders[-1][1], 5)
    assert (view.rank, view.source) == (0, 1), "the lowest rank that holds the state hands it out"
    worlds = [World(rank=rank, size=4, members=view.members) for rank in range(4)]
    assert [world.writes for world in worlds] == [False, False, True, False]


def test_who_replaces_a_member_waits_until_its_loss_is_known():
    membership = Membership(Bounds(min=2))
    for place in (0, 1):
        membership.join(info(str(place), place=place))
    membership.admit()
    membership.join(info("1", place=1))
    vote(membership, 1)
    assert kinds(vote(membership, 2)) == [(1, CommitNotice), (2, CommitNotice)]
    assert membership.waiting == [3]
    assert kinds(membership.lose(2, "silent"))[-2:] == [(1, NewEpoch), (3, NewEpoch)]
    assert membership.world.members == [1, 3]


def test_loss_drops_what_was_finished_and_keeps_what_was_committed():
    membership, _ = started(3)
    for member in (1, 2, 3):
        vote(membership, member)
    vote(membership, 1)
    epoch = membership.world.epoch
    orders = membership.lose(2, "died")
    assert kinds(orders) == [(2, Evicted), (1, NewEpoch), (3, NewEpoch)]
    assert (membership.world.epoch, membership.world.committed, membership.world.votes) == (epoch + 1, 1, {})
    # a late fin of the old epoch counts for nothing
    assert membership.vote(3, Vote(epoch=epoch, step=1, digest="d")) == []
    assert not membership.world.votes
    assert membership.lose(2, "died") == []


def test_different_digests_are_not_committed():
    membership, _ = started(3)
    for _ in range(3):
        epoch = membership.world.epoch
        vote(membership, 1), vote(membership, 2)
        assert kinds(vote(membership, 3, "other"))[0] == (1, NewEpoch)
        assert membership.world.epoch == epoch + 1
        assert membership.world.committed == 0
    vote(membership, 1), vote(membership, 2)
    orders = vote(membership, 3, "other")
    assert kinds(orders)[0] == (3, Evicted)
    assert membership.counts["divergences"] == 4


def test_fewer_than_the_minimum_wait():
    membership, _ = started(2, fewest=2)
    assert kinds(membership.lose(2, "died")) == [(2, Evicted), (1, TooFew)]
    membership.join(info())
    assert kinds(membership.admit()) == [(1, NewEpoch), (3, NewEpoch)]


def test_more_than_the_maximum_are_spares():
    membership, orders = started(3, most=2)
    assert kinds(orders) == [(1, NewEpoch), (2, NewEpoch)]
    vote(membership, 1)
    assert kinds(vote(membership, 2)) == [(1, CommitNotice), (2, CommitNotice)]
    membership.lose(1, "died")
    assert kinds(vote(membership, 2))[-1] == (3, NewEpoch)


def test_members_with_an_older_state_are_healed_by_one_with_the_newest():
    membership = Membership(Bounds(min=3))
    for step, state in ((4, "x"), (6, "y"), (6, "z")):
        membership.join(info(step=step, state=state))
    config = membership.admit()[0][1]
    assert (config.committed, config.stale) == (6, (1, 3))


def test_job_whose_state_nobody_holds_is_over():
    membership, _ = started(1)
    membership.join(info())
    vote(membership, 1)
    assert membership.lost_state() is None
    membership.lose(1, "died")
    assert "checkpoint" in membership.lost_state()


def test_repeated_link_failures_evict_the_one_named_most():
    membership, _ = started(3)
    for member in (1, 2, 1, 2):
        failed = LinkFailed(epoch=membership.world.epoch, peer=3, reason="reset")
        orders = membership.failed(member, failed)
    assert (3, Evicted) in kinds(orders)
    assert membership.world.members == [1, 2]


def test_blocked_ports_are_named_from_where_to_where():
    """The second member's host cannot reach the first's; both live."""
    membership = Membership(Bounds())
    for name, host, port in (("a:0", "10.0.0.1", 4001), ("b:0", "10.0.0.2", 4002), ("c:0", "10.0.0.3", 4003)):
        membership.join(info(name, addresses=((host, port),)))
    membership.admit()
    for _ in range(4):
        told = LinkFailed(epoch=membership.world.epoch, peer=1, reason="refused")
        orders = membership.failed(2, told)
    fenced = [(member, message.reason) for member, message in orders if isinstance(message, Evicted)]
    assert fenced == [(2, "unreachable: no data from b:0 (10.0.0.2) to a:0 (10.0.0.1:4001)")]
    assert membership.world.members == [1, 3]
    # whoever is gone is blamed no more
    membership.failed(3, LinkFailed(epoch=membership.world.epoch, peer=3, reason="itself"))
    membership.failed(3, LinkFailed(epoch=membership.world.epoch, peer=2, reason="gone"))
    assert not membership.world.blamed


def test_refusal_names_the_difference():
    membership, _ = started(1)
    reason = membership.join(info(facts={**FACTS, "plan": "q", "extra": "e"}))
    assert reason == (
        "this process does not belong to the job: extra is e, the job's is missing; plan is q, the job's is p"
    )
    assert membership.people.keys() == {1}


@pytest.mark.parametrize(
    "fields",
    [{}, {"info": 1}, {"info": ["a", 1, {}, 0, "", "", "", False]}, {"info": ["a", [], {}, 0, "", "", "", False]}],
)
def test_malformed_join(fields):
    assert decode(json.dumps({"kind": "join", **fields}).encode()) == Malformed("join")


def test_malformed_and_unknown_messages_are_refused_or_counted(coordinator):
    def raw(control, body):
        with control._lock:
            control._sock.sendall(control._wire.seal(body))

    control = connect([coordinator.address], b"secret", seconds=100)
    raw(control, b'{"kind":"join","info":[]}')
    assert control.receive() == [Refused("a join message that is malformed")]
    assert isinstance(control.ask(Join(info()), seconds=100)[0], Welcome)
    for body in (b'{"kind":"vote"}', b'{"kind":"unheard of"}', b'{"kind":"hb","tick":"x"}', b'{"kind":"join"}'):
        raw(control, body)
    control.send(Leave())
    until(lambda: not coordinator.membership.people)
    assert coordinator.membership.counts["malformed"] == 3
    assert coordinator.membership.counts["left"] == 1
    control.close()


def test_messages_keep_their_types():
    epoch = NewEpoch(
        epoch=3,
        members=(1, 2),
        stale=(),
        committed=4,
        chain="c",
        quorum_sets=((1, 2), (1,)),
        people=(info(), info("b")),
    )
    for message in (
        Join(info()),
        epoch,
        Heartbeat(tick=3),
        MemberDied(4),
        Leave(),
        LinkFailed(epoch=1, peer=None, reason="r"),
    ):
        assert decode(encode(message)) == message
    assert decode(b'{"kind":"hb","tick":"x"}') == Malformed("hb")
    assert decode(b'{"kind":"dead"}') == Malformed("dead")
    assert decode(b'{"kind":"unheard of"}') == Malformed("unheard of")


@pytest.mark.parametrize(("fewest", "most"), [(0, 1), (3, 2), (1, 257)])
def test_bad_bounds(fewest, most):
    with pytest.raises(ValueError, match="MIN <= MAX"):
        Bounds(min=fewest, max=most)


def test_wire_in_any_pieces():
    member, coordinator = Wire(b"k", "member"), Wire(b"k", "coordinator")
    data = member.pack(Leave()) + member.pack(MemberDied(1))
    got = [m for i in range(len(data)) for m in coordinator.feed(data[i : i + 1])]
    assert got == [Leave(), MemberDied(1)]


def test_replayed_reflected_changed_and_foreign_messages():
    member = Wire(b"k", "member")
    first = member.pack(Leave())
    fresh = lambda: Wire(b"k", "coordinator")  # noqa: E731
    replayed = fresh()
    replayed.feed(first)
    with pytest.raises(WireError, match="foreign"):
        replayed.feed(first)
    with pytest.raises(WireError, match="foreign"):
        fresh().feed(member.pack(Alive()))
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
    data = Wire(b"k", "member").pack(Leave())
    with pytest.raises(WireError):
        Wire(b"k", "coordinator").feed(data)


@pytest.fixture
def coordinator():
    server = Coordinator(b"secret", timing=Timing(patience=0.2, silence=5.0)).start()
    yield server
    server.stop()


def options(server, secret=b"secret", **changes):
    return JoinOptions(coordinators=[server.address], secret=secret, name="n", **{"facts": FACTS, **changes})


def test_wrong_secret_is_refused_and_counted(coordinator):
    with pytest.raises(ConnectionError, match="secrets differ"):
        Member(options(coordinator, b"wrong"))
    until(lambda: coordinator.membership.counts["foreign"] == 1)
    assert not coordinator.membership.people


def test_other_model_plan_or_version_is_refused_by_name(coordinator):
    member = Member(options(coordinator))
    for fact, value in FACTS.items():
        with pytest.raises(UserError, match=f"{fact} is other, the job's is {value}"):
            Member(options(coordinator, facts={**FACTS, fact: "other"}))
    member.close()


def test_replayed_join_is_refused(coordinator):
    """Everything a member has sent, recorded and sent again on a new connection."""
    with socket.create_connection(coordinator.address) as sock:
        hello = sock.recv(100)
        connector = Connector(b"secret", b"member")
        answer = connector.answer(hello)
        sock.sendall(answer)
        join = Wire(connector.session, "member").pack(Join(info()))
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
    server = Coordinator(b"secret", bounds=Bounds(min=2), timing=Timing(patience=0.5, silence=5.0)).start()
    members = [Member(options(server)) for _ in range(2)]
    group = members[0].group()
    seat = members[0].await_view(-1)
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


def until(true, seconds=100.0):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)
