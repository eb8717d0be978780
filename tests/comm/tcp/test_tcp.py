"""The TCP data plane: sums, messages in any order, abort as a state, foreign traffic."""

import resource
import socket
import threading
import time
from contextlib import suppress

import pytest
import torch
from mesh import SECRET, everywhere, mesh

from heteromesh.comm.tcp import collectives
from heteromesh.comm.tcp.abort import Abort, GroupAborted
from heteromesh.comm.tcp.auth import ANSWER_HEAD, HELLO, Acceptor, AuthError, Connector
from heteromesh.comm.tcp.connect import Place, build
from heteromesh.comm.tcp.frame import Frame, FrameError, checksum, unpack
from heteromesh.comm.tcp.link import Link, Message, Outbox
from heteromesh.comm.tcp.listen import Claim, Listener, most_handshakes


@pytest.mark.parametrize(("size", "count", "links"), [(1, 10, 1), (2, 7, 1), (3, 100_001, 1), (5, 300_000, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_sum_is_exact_and_equal_everywhere(size, count, links, dtype):
    values = [torch.arange(count).remainder(7).to(dtype) * 2**r for r in range(size)]
    with mesh(size, links) as (transports, pool):

        def act(transport):
            out = torch.empty_like(values[transport.rank])
            return out, collectives.all_reduce(transport, values[transport.rank], out, checked=True, chunk_bytes=4096)

        results = everywhere(pool, act, transports)
    want = torch.arange(count).remainder(7) * (2**size - 1)
    assert all(torch.equal(out.to(torch.int64), want) for out, _ in results)
    assert {summed.mask for _, summed in results} == {2**size - 1}
    assert len({summed.digest for _, summed in results}) == 1
    assert results[0][1].digest


@pytest.mark.parametrize("count", [100, 50_000])
def test_digest_tells_results_apart(count):
    def run(values):
        with mesh(2) as (transports, pool):
            out = everywhere(
                pool,
                lambda t: collectives.all_reduce(t, values, torch.empty_like(values), checked=True, chunk_bytes=4096),
                transports,
            )
        return out[0].digest

    ones = torch.ones(count)
    other = ones.clone()
    other[-1] = 2
    assert run(ones) == run(ones) != run(other)


@pytest.mark.parametrize("count", [100, 50_000])
def test_rank_that_does_not_contribute_is_not_in_the_sum(count):
    with mesh(3) as (transports, pool):

        def act(transport):
            out = torch.empty(count)
            source = torch.full((count,), float(10**transport.rank))
            mask = collectives.all_reduce(transport, source, out, contributes=transport.rank != 1).mask
            return mask, out

        results = everywhere(pool, act, transports)
    assert all(mask == 0b101 and bool((out == 101).all()) for mask, out in results)


def test_other_collectives():
    with mesh(4) as (transports, pool):

        def act(transport):
            rank, size = transport.rank, transport.size
            parts = [torch.full((r * 1000,), rank) for r in range(size)]
            collectives.all_gather(transport, parts)
            word = torch.full((50_000,), rank)
            collectives.broadcast(transport, word, 2)
            return parts, word

        for parts, word in everywhere(pool, act, transports):
            assert all(bool((part == r).all()) for r, part in enumerate(parts))
            assert bool((word == 2).all())


def test_message_before_its_receive_does_not_hold_up_others():
    with mesh(2) as ((one, two), _):
        first, second = torch.full((500_000,), 1.0), torch.full((3,), 2.0)
        works = [one.send(1, first, 1), one.send(1, second, 2)]
        thread = threading.Thread(target=lambda: [work.wait() for work in works])
        thread.start()
        got = torch.empty(3)
        two.recv(0, got, 2).wait()
        late = torch.empty(500_000)
        two.recv(0, late, 1).wait()
        thread.join()
        assert torch.equal(got, second)
        assert torch.equal(late, first)


def test_two_threads_wait_on_one_transport():
    with mesh(2) as ((one, two), pool):
        outs = [torch.empty(100_000) for _ in range(2)]
        waits = [pool.submit(two.recv(0, outs[tag], tag).wait) for tag in range(2)]
        time.sleep(0.02)
        for tag in (1, 0):
            one.send(1, torch.full((100_000,), float(tag)), tag).wait()
        for wait in waits:
            wait.result(5)
        assert [float(out[-1]) for out in outs] == [0, 1]


def test_message_is_cut_over_several_connections():
    with mesh(2, links=3) as ((one, two), pool):
        value, got = torch.arange(2_000_000), torch.empty(2_000_000, dtype=torch.int64)
        received = pool.submit(two.recv(0, got, 0).wait)
        one.send(1, value, 0).wait()
        received.result(10)
        assert torch.equal(got, value)


def test_connections_leave_by_every_given_address():
    with mesh(2, links=2, hosts=("127.0.0.1", "127.0.0.2")) as ((one, _), _):
        assert {link.sock.getsockname()[0] for link in one.links_to(1)} == {"127.0.0.1", "127.0.0.2"}


@pytest.mark.alone
def test_abort_ends_a_blocked_wait_at_once():
    with mesh(3) as (transports, pool):

        def act(transport):
            try:
                transport.recv((transport.rank + 1) % 3, torch.empty(10), 0).wait()
            except GroupAborted as error:
                return time.monotonic(), str(error)

        waits = [pool.submit(act, transport) for transport in transports]
        time.sleep(0.05)
        start = time.monotonic()
        transports[0].abort.set(GroupAborted("asked for"))
        results = [wait.result(5) for wait in waits]
    assert results[0][1] == "asked for"
    assert all("lost rank" in text for _, text in results[1:])
    assert max(moment for moment, _ in results) - start < 0.5


def test_abort_is_a_state():
    with mesh(2) as ((one, _), _):
        one.abort.set(GroupAborted("first"))
        one.abort.set(GroupAborted("second"))
        for act in (lambda: one.send(1, torch.ones(1), 0), lambda: one.recv(1, torch.ones(1), 0)):
            with pytest.raises(GroupAborted, match="first"):
                act()


def test_abort_before_and_during_a_build():
    listener = Listener(SECRET)
    place = Place(addresses=[listener.addresses, listener.addresses], rank=0, epoch=1)
    abort = Abort()
    threading.Timer(0.05, lambda: abort.set(GroupAborted("late"))).start()
    with pytest.raises(GroupAborted, match="late"):
        build(listener, place, SECRET, abort)  # rank 1 never comes
    with pytest.raises(GroupAborted, match="late"):
        build(listener, place, SECRET, abort)
    abort.close()
    listener.close()


def test_a_peer_that_is_not_there_is_named():
    listener, gone = Listener(SECRET), Listener(SECRET)
    place = Place(addresses=[gone.addresses, listener.addresses], rank=1, epoch=1)
    gone.close()
    abort = Abort()
    with pytest.raises(GroupAborted, match="rank 0 could not be reached") as caught:
        build(listener, place, SECRET, abort)
    assert caught.value.peer == 0
    abort.close()
    listener.close()


def test_lost_peer_is_named():
    with mesh(2) as ((one, two), pool):
        wait = pool.submit(one.recv(1, torch.empty(10), 0).wait)
        time.sleep(0.02)
        two.close()
        with pytest.raises(GroupAborted) as caught:
            wait.result(5)
        assert caught.value.peer == 1


def test_peer_may_close_when_nothing_is_due():
    with mesh(2) as ((one, two), _):
        got = torch.empty(4)
        two.send(0, torch.ones(4), 0).wait()
        two.close()
        one.recv(1, got, 0).wait()
        assert bool((got == 1).all())


def test_sizes_that_differ_abort():
    with mesh(2) as ((one, two), _):
        one.send(1, torch.ones(4), 0)
        with pytest.raises(GroupAborted, match="has 16 bytes, its receive has room for 8"):
            two.recv(0, torch.empty(2), 0).wait()


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda t: t.send(0, torch.ones(1), 0), "no peer"),
        (lambda t: t.send(5, torch.ones(1), 0), "no peer"),
        (lambda t: t.send(1, torch.ones(0), 0), "empty"),
        (lambda t: t.send(1, torch.ones(4, 4).t(), 0), "contiguous"),
    ],
)
def test_bad_arguments(act, text):
    with mesh(2) as ((one, _), _), pytest.raises(ValueError, match=text):
        act(one)


def test_foreign_traffic_is_dropped_and_counted():
    listener = Listener(SECRET)
    for data in (b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff" * 200):
        with socket.create_connection(listener.addresses[0]) as sock:
            sock.settimeout(5)
            with suppress(OSError):  # it may end the connection before all of this is said
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1000):
                    pass
    assert listener.counts["foreign"] == 2
    assert not listener.counts["accepted"]
    listener.close()


def proved(address, claim, secret=SECRET):
    """A connection whose other end knows the secret, and has heard this claim."""
    sock = socket.create_connection(address, timeout=150)
    connector = Connector(secret, claim)
    while not connector.advance(sock):
        pass
    return sock


@pytest.mark.parametrize("claim", [b"5", b"[" * 2000, b"null", b"{}", b"[1, 2, 3, 4]", b'["world", 1]', b"\xff"])
def test_a_proved_connection_that_claims_nonsense_ends_alone(claim):
    listener = Listener(SECRET)
    with proved(listener.addresses[0], claim) as sock:
        assert sock.recv(1) == b""
    good = Claim("world", 3, 1, 0)
    with proved(listener.addresses[0], good.pack()):
        limit = time.monotonic() + 20
        while not (found := listener.take("world", 3)):
            assert time.monotonic() < limit
        assert list(found) == [(1, 0)]
        found[1, 0].close()
    assert listener.counts["foreign"] == 1
    listener.close()


def test_a_flood_of_silent_connections_keeps_nobody_out(monkeypatch):
    """Few are held at once, and those that come later put out the oldest."""
    monkeypatch.setattr("heteromesh.comm.tcp.listen.most_handshakes", lambda: 8)
    listener = Listener(SECRET)
    flood = [socket.create_connection(listener.addresses[0]) for _ in range(40)]
    proved(listener.addresses[0], Claim("world", 3, 1, 0).pack()).close()
    assert listener.counts["foreign"] >= 32
    for sock in flood:
        sock.close()
    listener.close()


def test_unproved_connections_get_a_small_part_of_the_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
        assert most_handshakes() == 128
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_wrong_secret_cannot_build():
    listener, other = Listener(SECRET), Listener(b"another")
    abort = Abort()
    with pytest.raises(GroupAborted, match="could not be reached"):
        build(other, Place(addresses=[listener.addresses, other.addresses], rank=1, epoch=1), b"another", abort)
    assert listener.counts["foreign"] == 1
    for held in (abort, listener, other):
        held.close()


def test_connection_of_an_older_epoch_is_dropped():
    old, new = Listener(SECRET), Listener(SECRET)
    new.expect("world", 7, lambda: None)
    abort = Abort()
    place = Place(addresses=[new.addresses, old.addresses], rank=1, epoch=6)
    transport = build(old, place, SECRET, abort)  # the proof still comes; then the connection ends
    with pytest.raises(GroupAborted):
        transport.recv(0, torch.empty(1), 0).wait()
    transport.close()
    assert new.counts["stale"] == 1
    old.close()
    new.close()


def test_recorded_handshake_is_worthless():
    first, second = Acceptor(SECRET), Acceptor(SECRET)
    answer = Connector(SECRET, b"claim").answer(first.hello)
    head, rest = answer[:ANSWER_HEAD], answer[ANSWER_HEAD:]
    assert len(first.hello) == HELLO
    assert first.check(head, rest)[0] == b"claim"
    with pytest.raises(AuthError):
        second.check(head, rest)


def test_frames_of_another_epoch_and_foreign_bytes():
    packed = Frame(3, 1, 0, 0, 8, 8, 0, 0b11).pack()
    assert unpack(packed, 3).mask == 0b11
    for data, epoch, text in ((packed, 4, "epoch 3"), (b"x" * len(packed), 3, "no frame")):
        with pytest.raises(FrameError, match=text):
            unpack(data, epoch)


def test_changed_bytes_are_found():
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    link, values = Link(ours, 0, 1), memoryview(bytearray(range(64)))
    message = Message(values, 0, 0, checked=True)
    outbox = Outbox(1, 1 << 20)
    outbox.put(message)
    _, piece, header = outbox.take()
    changed = bytearray(piece)
    changed[17] ^= 4
    theirs.sendall(header + changed)

    class Box:
        def match(self, frame):
            return Message(memoryview(bytearray(64)), 0, 0)

        def finished(self, message):
            raise AssertionError("a changed message must not finish")

    time.sleep(0.05)
    with pytest.raises(FrameError, match="changed on its way"):
        link.fill(Box(), 1000)
    link.close()
    theirs.close()


def test_checksum_sees_every_byte():
    data = bytearray(29)
    plain = checksum(memoryview(data))
    for index in range(29):
        data[index] = 1
        assert checksum(memoryview(data)) != plain
        data[index] = 0
