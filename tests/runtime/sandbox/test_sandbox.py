"""The sandbox with real namespaces: needs root, `ip` and `tc`."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG, Device
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.runtime.sandbox import Sandbox, SandboxJob, parse_fault, why_not
from heteromesh.runtime.sandbox.leftovers import remove_leftovers

pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")]
FILE = """
[devices.slow]
tflops = 0.025
memory_gb = 4
memory_gbps = 10
link_gbps = 4
[[hosts]]
names = ["a", "b"]
device = "cpu"
count = 1
nics = [{ kind = "ethernet", gbit = 0.4 }, { kind = "ethernet", gbit = 0.1 }]
[[hosts]]
names = ["c"]
device = "slow"
count = 2
nics = [{ kind = "ethernet", gbit = 0.1 }]
"""
RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
connection, count = server.accept()[0], 0
began = time.perf_counter()
while got := len(connection.recv(1 << 20)):
    count += got
    print(count * 8e-9 / (time.perf_counter() - began), flush=True)
"""
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5000), source_address=(sys.argv[2], 0))
until = time.monotonic() + float(sys.argv[3])
while time.monotonic() < until:
    connection.sendall(bytes(1 << 16))
"""
NAPS = itertools.count(10_000 * os.getpid())
"""Seconds that a command sleeps: by them it is found, and other tests on this machine have others."""
NAP = str(next(NAPS))


def cluster():
    slow = Device(tflops=0.025, memory_gb=4, memory_gbps=10, link_gbps=4)
    wide, narrow = Nic(kind="ethernet", gbit=0.4), Nic(kind="ethernet", gbit=0.1)
    hosts = (
        Host(name="a", device="cpu", count=1, nics=(wide, narrow)),
        Host(name="b", device="cpu", count=1, nics=(wide, narrow)),
        Host(name="c", device="slow", count=2, nics=(narrow,)),
    )
    return Cluster(name="three", hosts=hosts, devices={"cpu": CATALOG["cpu"], "slow": slow})


def made(pid):
    """What exists on this machine of the sandboxes of a process."""
    roots = ("/run/netns", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/memory", "/sys/fs/cgroup")
    names = [p.name for root in roots for p in Path(root).glob("hm-*")]
    return [name for name in names if name.startswith(f"hm-{pid}-")]


def output(host, *command, **environment):
    process = host.start(command, environment=environment, piped=True)
    text = process.streams[0].read().decode()
    assert process.wait(150) == 0, process.streams[1].read()
    for stream in process.streams:
        stream.close()
    return text


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(cluster(), cores=0.9) as lasting:
        yield lasting
    assert not made(os.getpid())


def has_rate(receiver, sender, gbit, nic=0, within=0.25):
    """Whether a TCP connection has the rate: asked again, as a busy machine may make it lower."""
    for _ in range(10):
        found = rate(receiver, sender, nic=nic)
        assert found < (1 + within) * gbit
        if found > (1 - within) * gbit:
            return True
    return False


def rate(receiver, sender, seconds=0.5, nic=0):
    """Gbit/s of one TCP connection."""
    address, own = receiver.interfaces[nic].address, sender.interfaces[nic].address
    server = receiver.start([sys.executable, "-c", RECEIVE, address], piped=True)
    assert server.streams[0].readline() == b"ready\n"
    assert sender.start([sys.executable, "-c", SEND, address, own, str(seconds)]).wait(150) == 0
    lines = server.streams[0].read().split()
    assert server.wait(150) == 0
    for stream in server.streams:
        stream.close()
    return float(lines[-1])


def test_a_host_has_its_name_its_addresses_and_its_own_processes(sandbox):
    code = (
        "import os, socket; print(socket.getfqdn(), socket.gethostbyname('c'), len(os.listdir('/dev/shm')), end=' ')\n"
    )
    code += "print(os.getpid())"
    assert output(sandbox["b"], sys.executable, "-c", code).split() == ["b", sandbox["c"].address, "0", "2"]
    assert [i.name for i in sandbox["a"].interfaces] == ["eth0", "eth1"]
    assert sorted(os.listdir("/sys/class/net")) != ["eth0", "eth1", "lo"]
    assert output(sandbox["a"], "ls", "/sys/class/net").split() == ["eth0", "eth1", "lo"]


def test_a_command_is_told_its_place(sandbox):
    told = dict(line.split("=", 1) for line in output(sandbox["c"], "env", EXTRA="1").splitlines() if "=" in line)
    wanted = {"HETEROMESH_HOST": "c", "HETEROMESH_HOSTS": "a,b,c", "NODE_RANK": "2", "NNODES": "3", "NPROC": "2"}
    wanted |= {"MASTER_ADDR": sandbox["a"].address, "GLOO_SOCKET_IFNAME": "eth0", "EXTRA": "1", "OMP_NUM_THREADS": "1"}
    assert {name: told.get(name) for name in wanted} == wanted


def test_quotas_are_in_proportion_to_the_speeds_and_are_the_kernels(sandbox):
    assert sandbox.shares == pytest.approx((0.3, 0.3, 0.3))
    code = "import time; t=time.monotonic(); c=time.process_time()\nwhile time.monotonic()-t < 1: pass\n"
    code += "print(time.process_time()-c)"
    assert float(output(sandbox["a"], sys.executable, "-S", "-c", code)) < 0.36


def test_the_slower_end_of_a_link_sets_the_rate(sandbox):
    assert has_rate(sandbox["b"], sandbox["a"], 0.4)
    assert has_rate(sandbox["c"], sandbox["a"], 0.1)
    assert has_rate(sandbox["a"], sandbox["c"], 0.1)


def test_the_source_address_decides_which_card_sends(sandbox):
    assert has_rate(sandbox["b"], sandbox["a"], 0.1, nic=1)


def test_a_slowed_link_is_slow_until_it_is_restored(sandbox):
    sandbox["a"].slow(0.05, "eth0")
    assert has_rate(sandbox["b"], sandbox["a"], 0.05, within=0.4)
    sandbox["a"].restore()
    assert has_rate(sandbox["b"], sandbox["a"], 0.4)
    with pytest.raises(UserError, match=r"25 Gbit/s can't be emulated"):
        sandbox["a"].slow(25)
    with pytest.raises(UserError, match="no interface 'eth7': use one of eth0, eth1"):
        sandbox["a"].slow(0.1, "eth7")


def test_a_cut_interface_loses_its_carrier_and_the_other_stays(sandbox):
    def carriers():
        return output(sandbox["a"], "sh", "-c", "cat /sys/class/net/eth*/carrier").split()

    sandbox["a"].cut("eth1")
    assert carriers() == ["1", "0"]
    sandbox["a"].cut()
    assert carriers() == ["0", "0"]
    sandbox["a"].plug()
    assert carriers() == ["1", "1"]
    assert eventually(lambda: rate(sandbox["b"], sandbox["a"]) > 0.2)


def heard(stream, seconds):
    time.sleep(seconds)
    return stream.read()


def eventually(true, seconds=100):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.01)
    return False


def test_stop_halts_every_process_and_resume_lets_it_go_on(sandbox):
    process = sandbox["a"].start(["sh", "-c", "sh -c 'while :; do echo x; sleep 0.02; done' & wait"], piped=True)
    out = process.streams[0]
    out.readline()
    sandbox["a"].stop()
    os.set_blocking(out.fileno(), False)
    assert eventually(lambda: not heard(out, 0.3))
    assert not heard(out, 0.3)
    sandbox["a"].resume()
    assert eventually(lambda: heard(out, 0.1))
    sandbox["a"].kill()
    assert process.wait(150) == 128 + signal.SIGKILL
    for stream in process.streams:
        stream.close()


def test_what_a_command_leaves_running_ends_with_it(sandbox):
    assert sandbox["a"].start(["sh", "-c", f"sleep {NAP} & exit 3"]).wait(150) == 3
    assert not ran("sleep", NAP)
    process = sandbox["a"].start(["sh", "-c", f"trap 'exit 5' TERM; sleep {NAP} & wait"])
    assert eventually(lambda: ran("sleep", NAP))
    process.terminate()
    assert process.wait(150) == 5
    process = sandbox["a"].start(["sh", "-c", f"trap '' TERM; setsid sleep {NAP}"])
    assert eventually(lambda: ran("sleep", NAP))
    process.kill()
    assert not ran("sleep", NAP)


def ran(*words):
    """Whether a process with these arguments exists."""
    wanted = b"\0".join(w.encode() for w in words) + b"\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == wanted:
                return True
        except OSError:
            pass
    return False


def test_a_command_that_is_not_there_says_so(sandbox):
    process = sandbox["a"].start(["no-such-program"], piped=True)
    assert process.wait(150) == 127
    assert b"can't start no-such-program: No such file" in process.streams[1].read()
    for stream in process.streams:
        stream.close()
    with pytest.raises(UserError, match="no host 'd': use one of a, b, c"):
        sandbox["d"]


def test_a_host_that_fails_ends_the_job(sandbox, monkeypatch):
    monkeypatch.setattr("heteromesh.runtime.sandbox.supervise.GRACE_SECONDS", 0.1)
    lines = []
    job = SandboxJob(
        sandbox,
        ["sh", "-c", "echo at $HETEROMESH_HOST; test $HETEROMESH_HOST = b && exit 9; sleep 600"],
        sink=lambda host, error, line: lines.append((host, error, line)),
    )
    assert job.wait(250) == 9, "the others, which sleep for ten minutes, were ended"
    assert job.failed == "b"
    assert sorted(lines) == [(h, False, f"at {h}\n".encode()) for h in "abc"]


def test_scripted_faults_happen_on_time_and_their_hosts_do_not_count(sandbox, monkeypatch):
    monkeypatch.setattr("heteromesh.runtime.sandbox.supervise.GRACE_SECONDS", 0.1)
    specs = ("kill a@0.2", "slow b/eth1@0.1=0.05:0.2", "stop c@0.3", "kill b@60")
    told = []
    job = SandboxJob(
        sandbox, ["sleep", "0.6"], faults=[parse_fault(s, sandbox.cluster) for s in specs], tell=told.append
    )
    assert job.wait(150) == 0
    assert job.lost == {"a", "c"}
    assert (job.statuses["a"], job.statuses["b"]) == (137, 0)
    first, *middle, last = [re.sub(r"^\d+\.\d\d s: ", "", t) for t in told]
    assert first == "slow b/eth1 to 0.05 Gbit/s"
    assert sorted(middle) == ["end of slow b/eth1", "kill a", "stop c"]
    assert last == "the job was over before 60 s: kill b"


def test_a_job_that_takes_too_long_is_ended(sandbox):
    with pytest.raises(subprocess.TimeoutExpired):
        SandboxJob(sandbox, ["sleep", NAP]).wait(0.3)
    assert not ran("sleep", NAP)


def test_an_exception_leaves_nothing():
    before = made(os.getpid())

    def fail(sandbox):
        sandbox.start(["sleep", NAP])
        assert len(made(os.getpid())) > len(before)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Sandbox(cluster(), cores=0.5) as sandbox:
        fail(sandbox)
    assert not ran("sleep", NAP)
    assert made(os.getpid()) == before


def test_a_host_is_killed_that_uses_more_memory_than_its_devices_have():
    small = cluster()
    small = replace(small, devices={name: replace(d, memory_gb=0.1) for name, d in small.devices.items()})
    before = made(os.getpid())
    with Sandbox(small, cores=0.5, limit_memory=True) as sandbox:
        for megabytes, status in ((40, 0), (400, 137)):
            words = [sys.executable, "-c", f"bytearray({megabytes} << 20)"]
            assert sandbox["a"].start(words).wait(20) == status
    assert made(os.getpid()) == before


def test_a_setup_that_fails_half_way_leaves_nothing(monkeypatch):
    before = made(os.getpid())
    monkeypatch.setattr("heteromesh.runtime.sandbox.sandbox.find_controller", lambda kind: 1 / 0)
    with pytest.raises(ZeroDivisionError), Sandbox(cluster(), cores=0.5):
        pass
    assert made(os.getpid()) == before


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(FILE)
    return path


def command(file, *words, options=()):
    return [sys.executable, "-m", "heteromesh", "sandbox", *options, str(file), "--", *words]


@contextmanager
def started(file, before=":"):
    """A sandbox command whose hosts say that they are up, and sleep after a while; and what its sleep is told."""
    seconds = str(next(NAPS))
    process = subprocess.Popen(
        command(file, "sh", "-c", f"echo up; {before}; sleep {seconds}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        waiting = 3
        while waiting:
            line = process.stdout.readline()
            assert line, process.wait()
            waiting -= line.endswith(b"up\n")
        yield process, seconds
    finally:
        process.terminate()
        process.wait(150)
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_everything(file, number):
    with started(file) as (process, nap):
        assert made(process.pid)
        process.send_signal(number)
        assert process.wait(150) == 128 + number
        assert not made(process.pid)
        assert not ran("sleep", nap)


def test_after_sigkill_nothing_runs_and_the_next_start_removes_the_rest(file):
    with started(file) as (alive, _), started(file) as (killed, nap):
        killed.kill()
        killed.wait()
        assert eventually(lambda: not ran("sleep", nap))
        left = set(made(killed.pid))
        assert len(left) >= 4
        assert set(remove_leftovers()) >= left
        assert not made(killed.pid)
        assert len(made(alive.pid)) >= 4


def test_output_is_told_by_host_and_the_first_failure_is_the_exit_status(file):
    done = subprocess.run(
        command(file, "sh", "-c", "echo out; echo err >&2; exit $((NODE_RANK * 3))", options=["--fault", "kill a@60"]),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert sorted(done.stdout.splitlines()) == ["a | out", "b | out", "c | out"]
    assert {"a | err", "b | err", "c | err"} < set(done.stderr.splitlines())
    last = re.search(r"sandbox: host (b|c) ended with exit status (3|6)", done.stderr)
    assert last
    assert done.returncode == int(last[2])


def test_heteromesh_run_reduces_across_hosts(file, tmp_path):
    script = tmp_path / "reduce.py"
    script.write_text(
        "import os, socket, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "value = torch.tensor([float(dist.get_rank() + 1)])\n"
        "dist.all_reduce(value)\n"
        "said = socket.gethostname(), dist.get_rank(), int(value), torch.get_num_threads()\n"
        "print('%s %d %d %d\\n' % said, end='', flush=True)  # one write: ranks of a host share a pipe\n"
        "dist.destroy_process_group()\n"
    )
    pair = tmp_path / "pair.toml"
    pair.write_text(FILE.replace('names = ["a", "b"]', 'names = ["a"]'))
    words = command(pair, "heteromesh", "run", str(script), options=["--no-quota", "--raw"])
    done = subprocess.run(words, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["a 0 6 1", "c 1 6 1", "c 2 6 1"]


def test_output_that_nobody_reads_ends_the_job(file):
    with started(file, "while :; do echo x; sleep 0.05; done") as (process, _):
        process.stdout.close()
        assert process.wait(150) == 1
        assert not made(process.pid)
