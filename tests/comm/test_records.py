"""Records of operations on live transports, and their way to the coordinator."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mesh import everywhere, mesh

from heteromesh.comm.tcp import collectives
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.frame import Frame
from heteromesh.comm.tcp.info import TcpInfo, tcp_info, together
from heteromesh.comm.tcp.records import Records
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.diagnosis.monitor import Monitor
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing


@pytest.mark.alone
def test_each_collective_is_recorded_with_bytes_and_waits():
    with mesh(3) as (transports, pool):

        def act(transport):
            if transport.rank == 1:
                time.sleep(0.1)
            source = torch.ones(60_000)
            collectives.all_reduce(transport, source, torch.empty_like(source))
            collectives.broadcast(transport, source, 0)
            return transport.records

        first, late, other = everywhere(pool, act, transports)
        records = first.operations()
    assert [(r.name, r.sequence) for r in records] == [("all_reduce", 1), ("broadcast", 2)]
    total, cast = records
    assert total.enter < total.exit <= cast.enter < cast.exit
    # every peer sends its part of this rank's shard and the sum of its own: 20 000 elements each
    assert total.counts.received == pytest.approx((0, 160_000, 160_000), rel=0.01)
    assert total.counts.sent == pytest.approx((0, 160_000, 160_000), rel=0.01)
    assert cast.counts.sent == pytest.approx((0, 120_000, 120_000), rel=0.01)
    for records in (first, other):
        counts = records.operations()[0].counts
        assert counts.late[1] > 80e6
        assert counts.late[1] <= counts.waited[1]
        assert sum(counts.waited) - counts.waited[1] < 50e6
    assert sum(late.operations()[0].counts.waited) < 50e6
    assert first.entered == first.finished == 2


def test_slow_bytes_are_flow_and_not_lateness():
    with mesh(2) as ((one, two), pool):
        got = torch.empty(8, dtype=torch.uint8)
        header = torch.arange(8, dtype=torch.uint8)
        wait = pool.submit(one.recv(1, got, 0).wait)
        time.sleep(0.05)
        # half of a frame by hand, the rest later: bytes are on their way all the time between
        two.links_to(0)[0].sock.setblocking(True)
        message, began = _frame(header), time.monotonic_ns()
        two.links_to(0)[0].sock.sendall(message[:-4])
        time.sleep(1)
        two.links_to(0)[0].sock.sendall(message[-4:])
        wait.result(150)
        ended = time.monotonic_ns()
        counts = one.records.counts(ended)
    assert torch.equal(got, header)
    # a busy machine sees the first bytes later than they come, by less than the second until the last
    assert 0 < counts.late[1] < counts.flow[1] <= ended - began
    assert counts.waited[1] == pytest.approx(counts.late[1] + counts.flow[1], rel=0.2)


def _frame(tensor):
    return Frame(1, 0, 0, 0, tensor.nbytes, tensor.nbytes, 0, 0).pack() + tensor.numpy().tobytes()


def test_an_operation_that_is_aborted_is_left():
    with mesh(2) as ((one, two), _):
        two.close()
        with pytest.raises(GroupAborted):
            collectives.all_reduce(one, torch.ones(4), torch.empty(4))
        assert one.records.entered == one.records.finished == 1


def test_the_ring_keeps_the_last_operations():
    records = Records(2, {}, keep=4)
    for index in range(10):
        records.enter(f"op{index}")
        records.waited(1, True, time.monotonic_ns() - 1000, 0)
        records.exit()
    kept = records.operations()
    assert [(r.name, r.sequence) for r in kept] == [("op7", 8), ("op8", 9), ("op9", 10)]
    assert all(1000 <= r.counts.waited[1] < 1e8 for r in kept)
    assert Records(2, {}).operations() == []


def test_tcp_info_of_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        two, _ = server.accept()
        with one, two:
            one.sendall(bytes(100_000))
            received = 0
            while received < 100_000:
                received += len(two.recv(1 << 16))
            info = tcp_info(one)
            assert 0 < info.rtt < 1
            assert info.retrying == 0
            assert info.rate > 0
            assert together([info, info]).rate == 2 * info.rate
            assert together([]) == TcpInfo()
        with pytest.raises(OSError, match="Bad file"):
            tcp_info(one)


def test_members_report_and_the_coordinator_names_the_one_that_does_nothing():
    lines = []
    timing = Timing(silence=10, stuck=0.6, gather=0.3)
    server = Coordinator(b"s", bounds=Bounds(min=2), timing=timing, monitor=Monitor(say=lines.append)).start()
    members = [Member(JoinOptions(coordinators=[server.address], secret=b"s", name=str(i))) for i in range(3)]

    def act(index):
        steps = Steps(members[index].group())
        steps.start()
        for _ in range(3):
            steps.reduce([torch.ones(1000)])
        if index == 1:
            time.sleep(2.0)
            return None
        return steps.reduce([torch.ones(1000)]).names

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(act, range(3)))
    for member in members:
        member.close()
    server.stop()
    assert results == [("0", "2"), None, ("0", "2")]
    assert server.membership.counts["malformed"] == 0
    events = server.monitor.events.entries
    event = next(e for e in events if e["kind"] == "diagnosis")
    assert (event["syndrome"], event["names"], event["ranks"]) == ("non-communication hang", ["1"], [1])
    assert (event["operation"], event["sequence"]) == ("all_reduce", 4)
    assert lines[0].startswith("non-communication hang: rank 1 (1 at 127.0.0.1) in all_reduce 4 of group world: it has")
    assert lines[0].endswith("done: evicted")
    assert ("1", "stuck") in [(e["name"], e["reason"]) for e in events if e["kind"] == "lost"]
