"""`heteromesh run --fault-tolerance` as a user types it: workers die, come back, end; signals; several hosts."""

import json
import os
import signal
import socket
import textwrap
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from members import free_addresses, wait_until

from forks import context
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.runtime.cli.main import main
from heteromesh.runtime.launch import run as launcher
from heteromesh.runtime.launch.countdown import Countdown
from heteromesh.runtime.process.environment import (
    bounds_from_environment,
    environment_of,
    join_address,
    join_options,
    parse_addresses,
)

SECRET = "0123456789abcdef" * 4
LOCAL = "127.0.0.1"
MEMBER = """
    import json, os, signal, sys, time
    import torch
    from heteromesh.faults.member.member import Member
    from heteromesh.faults.member.commit import Steps
    from heteromesh.runtime.process.environment import join_options

    folder, sizes = sys.argv[1], json.loads(sys.argv[2])
    victim = sys.argv[3:] == [os.environ["LOCAL_RANK"]] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    state = torch.zeros(2, dtype=torch.int64)  # steps done, how many of the wanted sizes of the group were seen
    member = Member(join_options(facts={"model": "m"}))
    steps = Steps(member.group(), lambda: [state])
    steps.start()
    with open(f"{folder}/{os.getpid()}", "w") as log:
        while state[1] < len(sizes):
            commit = steps.reduce([torch.ones(4, dtype=torch.int64)])
            size = len(commit.contributors)
            assert commit.sums[0].tolist() == [size] * 4
            state[0] += 1
            state[1] += int(size == sizes[state[1]])
            print(commit.step, size, int(state[0]), commit.names[0], file=log, flush=True)
            if victim and size == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
    member.close()
"""


@pytest.fixture
def member(tmp_path):
    path = tmp_path / "member.py"
    path.write_text(textwrap.dedent(MEMBER))
    (tmp_path / "logs").mkdir()
    return path


def script(folder, text):
    path = folder / "worker.py"
    path.write_text(textwrap.dedent(text))
    return path


def run(*words):
    """In this process: the agent needs no fresh one."""
    return launcher.main(["--fault-tolerance", *map(str, words)])


class Agent:
    """`heteromesh run --fault-tolerance` as a process with a session of its own, as a terminal gives it."""

    def __init__(self, folder, words, variables):
        self.log = folder / f"agent{len(list(folder.glob('agent*')))}"
        self.process = context.Process(target=_agent, args=(self.log, list(map(str, words)), variables))
        self.process.start()
        self.pid = self.process.pid

    def end(self, seconds=150.0):
        """(exit code, standard output and error)"""
        self.process.join(seconds)
        return self.process.exitcode, self.log.read_text()


def _agent(log, words, variables):
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    os._exit(main(["run", "--fault-tolerance", *words]))


@contextmanager
def started(folder, *words, **variables):
    agent = Agent(folder, words, variables)
    try:
        yield agent
    finally:
        agent.process.kill()
        agent.process.join()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.alone
def test_others_go_on_without_a_killed_worker_and_it_comes_back(member, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("heteromesh.runtime.launch.agent._PAUSE", 0.1)
    assert run("--nproc-per-node", 3, member, tmp_path / "logs", [3, 2, 2, 2, 3, 3], 1) == 0
    told = capfd.readouterr().err
    assert f"worker {socket.gethostname()}:1 was killed by SIGKILL: it is started again (1 of 3 times)" in told
    logs = [[line.split() for line in path.read_text().splitlines()] for path in (tmp_path / "logs").iterdir()]
    assert len(logs) == 4, "three workers and one that was started again"
    whole = max(logs, key=len)
    sizes = [int(size) for _, size, _, _ in whole]
    assert [s for s, before in zip(sizes, [0, *sizes], strict=False) if s != before][-3:] == [3, 2, 3]
    for log in logs:  # no step is done twice or left out, also by the one that joined
        assert [int(done) for _, _, done, _ in log] == [int(step) + 1 for step, *_ in log]
    assert sorted(log[-1][0] for log in logs)[-3:] == [whole[-1][0]] * 3, "three ended with the same step"


def test_exit_codes_and_restarts(tmp_path, capfd, monkeypatch):
    """Worker 1 fails as it is told to: by its first start's exit code, and its second's.

    Worker 0 ends when the agent has seen the end of a certain start of worker 1, or after a minute.
    """
    monkeypatch.setattr("heteromesh.runtime.launch.agent._PAUSE", 0.1)
    path = script(
        tmp_path,
        """
        import json, os, sys, time
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
        print(json.dumps({name: os.environ.get(name) for name in names}), flush=True)
        start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        folder, awaited, *codes = sys.argv[1:]
        if os.environ["LOCAL_RANK"] == "1":
            with open(f"{folder}/{start}.part", "w") as file:
                file.write(str(os.getpid()))
            os.rename(file.name, f"{folder}/{start}")
            if start < len(codes):
                with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
                    json.dump({"message": {"message": "UserError: the data is missing: look for it"}}, file)
                sys.exit(int(codes[start]))
            sys.exit()
        end = time.monotonic() + 600
        while time.monotonic() < end:
            if os.path.exists(f"{folder}/{awaited}"):
                if not os.path.exists("/proc/" + open(f"{folder}/{awaited}").read()):
                    break
            time.sleep(0.02)
        """,
    )
    folders = [tmp_path / name for name in "abcdef"]
    for folder in folders:
        folder.mkdir()
    assert run("--nproc-per-node", 2, path, folders[0], 1, 1) == 0
    out, err = capfd.readouterr()
    first = json.loads(out.splitlines()[0])
    assert (first["RANK"], first["WORLD_SIZE"]) == (None, None)
    assert (first["LOCAL_WORLD_SIZE"], first["OMP_NUM_THREADS"]) == ("2", os.environ.get("OMP_NUM_THREADS", "1"))
    assert len(out.splitlines()) == 3
    assert "ended with exit code 1 (UserError: the data is missing: look for it): it is started again" in err
    began = time.monotonic()
    assert run("--nproc-per-node", 2, path, folders[1], "never", 2) == 2
    assert time.monotonic() - began < 250, "the other worker was ended"
    assert capfd.readouterr().err == "heteromesh: error: the data is missing: look for it\n"
    # refused when it came again: the others finish
    assert run("--nproc-per-node", 2, path, folders[2], 1, 1, 2) == 0
    assert "error: the data is missing" in capfd.readouterr().err
    assert run("--nproc-per-node", 2, "--max-restarts", 0, path, folders[3], 0, 7) == 0, "the other one has done all"
    assert "ended with exit code 7 (UserError" in capfd.readouterr().err
    # asked to stop on another host, and saved
    assert run("--nproc-per-node", 2, path, folders[4], "never", 143) == 143
    assert capfd.readouterr().err == ""
    assert run("--nproc-per-node", 2, "--shutdown-timeout", 1, path, folders[5], "never", 0) == 1
    assert ":0 did not end within 1 s after the first worker was done" in capfd.readouterr().err


def test_too_few_members_are_waited_for_and_named(tmp_path, capfd):
    path = script(
        tmp_path,
        """
        import os, sys, time
        from heteromesh.faults.wire.control import connect
        from heteromesh.faults.wire.messages import Heartbeat, Join, JoinInfo
        if os.environ["LOCAL_RANK"] == "1":
            sys.exit(1)
        host, port = os.environ["HETEROMESH_COORDINATORS"].split(":")
        control = connect([(host, int(port))], os.environ["HETEROMESH_SECRET"].encode(), seconds=60, silence=60)
        name = os.environ["HETEROMESH_MEMBER_NAME"]
        control.send(Join(JoinInfo(name=name, addresses=(("h", 1),), facts={})))
        while True:
            control.send(Heartbeat())
            time.sleep(0.05)
        """,
    )
    words = ["--min-ranks", 2, "--max-restarts", 0, "--rdzv-conf", "join_timeout=1.2"]
    assert run("--nproc-per-node", 2, *words, path) == 1
    lines = capfd.readouterr().err.splitlines()
    assert "heteromesh: 1 of at least 2 ranks is here, waiting 1 s more" in lines
    assert lines[-1] == (
        "heteromesh: error: only 1 of at least 2 ranks came within 1.2 s: start the others in that time"
    )


def test_a_countdown_is_said_every_ten_seconds():
    names = [SimpleNamespace(name=name) for name in "abc"]
    world = SimpleNamespace(members=[])
    membership = SimpleNamespace(bounds=Bounds(min=3, max=4), people={}, world=world)
    coordinator, told = SimpleNamespace(membership=membership, short_seconds=None), []
    countdown = Countdown(coordinator, 60.0, told.append)
    assert countdown.look(0.0, ["a", "b"]) == ""
    membership.people[1] = names[0]
    assert countdown.look(500.0, ["a", "b"]) == ""
    assert told == [], "b still loads its data"
    membership.people[2] = names[1]
    ends = [countdown.look(1000.0 + second, ["a", "b"]) for second in range(61)]
    assert told == [f"2 of at least 3 ranks are here, waiting {left} s more" for left in (60, 50, 40, 30, 20, 10)]
    assert ends[:-1] == [""] * 60
    assert ends[-1] == "only 2 of at least 3 ranks came within 60 s: start the others in that time"
    membership.people[3], world.members = names[2], [1, 2, 3]
    assert countdown.look(2000.0, ["a", "b"]) == ""
    world.members, coordinator.short_seconds = [1], 12.3
    assert countdown.look(3000.0, ["a", "b"]) == ""
    assert told[-1] == "1 of at least 3 ranks is left, waiting 12 s more"
    assert countdown.look(4000.0, ["a", "b"]) == "", "the coordinator ends it"
    membership.people |= dict.fromkeys(range(4, 7), names[0])
    for _ in range(2):
        countdown.look(5000.0, [])
    assert [line for line in told if "wait until" in line] == [
        "the job takes 4 ranks, and 2 more wait until one of them is lost"
    ]


SLEEPER = """
    import os, signal, subprocess, sys, time
    child = subprocess.Popen(["sleep", "1000"])
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopped.append(n))
    with open(f"{sys.argv[1]}/{os.environ['LOCAL_RANK']}", "w") as file:
        print(os.getpid(), child.pid, file=file)
    os.rename(file.name, file.name + ".pids")
    while not stopped or (sys.argv[2] == "deaf"):
        time.sleep(0.01)
    time.sleep(0.2)
    print("saved after", stopped, flush=True)
    sys.exit(128 + stopped[0])
"""


def family(folder):
    wait_until(lambda: len(list(folder.glob("*.pids"))) == 2)
    return [int(pid) for path in folder.glob("*.pids") for pid in path.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_worker_once_and_leaves_nothing(number, tmp_path):
    """Ctrl-C as a terminal sends it, to the agent's whole process group; SIGTERM as a scheduler does, to the agent."""
    with started(tmp_path, "--nproc-per-node", 2, script(tmp_path, SLEEPER), tmp_path, "hears") as agent:
        pids = family(tmp_path)
        (os.killpg if number == signal.SIGINT else os.kill)(agent.pid, number)
        assert agent.end() == (128 + number, f"saved after [{int(number)}]\n" * 2)
    assert not [pid for pid in pids if alive(pid)]


def test_workers_that_do_not_hear_are_killed(tmp_path):
    words = ["--nproc-per-node", 2, "--shutdown-timeout", 1, script(tmp_path, SLEEPER), tmp_path, "deaf"]
    with started(tmp_path, *words) as agent:
        pids = family(tmp_path)
        os.kill(agent.pid, signal.SIGTERM)
        assert agent.end() == (128 + signal.SIGTERM, "")
    assert not [pid for pid in pids if alive(pid)]


def test_nothing_outlives_a_killed_agent(tmp_path):
    with started(tmp_path, "--nproc-per-node", 2, script(tmp_path, SLEEPER), tmp_path, "deaf") as agent:
        pids = family(tmp_path)
        os.kill(agent.pid, signal.SIGKILL)
        wait_until(lambda: not [pid for pid in pids if alive(pid)])
        assert agent.end() == (-signal.SIGKILL, "")


@pytest.mark.alone
def test_a_stopped_agent_is_waited_for(member, tmp_path):
    """For longer than a coordinator that hangs is waited for where another could be elected."""
    logs = tmp_path / "logs"
    with started(tmp_path, "--nproc-per-node", 2, member, logs, [2] * 30) as agent:
        wait_until(lambda: sum(path.stat().st_size for path in logs.iterdir()) > 20, 120)
        os.kill(agent.pid, signal.SIGSTOP)
        time.sleep(1.5 * Timing().hang)
        os.kill(agent.pid, signal.SIGCONT)
        code, told = agent.end(120)
    assert code == 0, told
    assert "was killed" not in told
    assert "started again" not in told
    assert len(list(logs.iterdir())) == 2


@pytest.mark.alone
def test_a_job_whose_workers_all_freeze_goes_on(member, tmp_path):
    """As under a paused container, for much longer than one silent member is waited for. The agent is not stopped."""
    logs = tmp_path / "logs"
    with started(tmp_path, "--nproc-per-node", 2, member, logs, [2] * 30) as agent:
        wait_until(lambda: sum(path.stat().st_size for path in logs.iterdir()) > 20, 120)
        frozen = [int(path.name) for path in logs.iterdir()]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4.0)
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        code, told = agent.end(120)
    assert code == 0, told
    # of one that was put out another came, and has what the last holder had
    steps = [int(line.split()[0]) for path in logs.iterdir() for line in path.read_text().splitlines()]
    assert max(steps) >= 29
    done = [tuple(line.split()[0:3:2]) for path in logs.iterdir() for line in path.read_text().splitlines()]
    assert all(int(state) == int(step) + int(done[0][1]) - int(done[0][0]) for step, state in done), "no step twice"


@pytest.mark.alone
def test_two_hosts_survive_the_loss_of_the_agent_that_served_the_coordinator(member, tmp_path):
    """Two agents on loopback stand for two hosts."""
    ports = [port for _, port in free_addresses(2)]
    endpoint = ",".join(f"{LOCAL}:{port}" for port in ports)
    words = ["--nnodes", "1:3", "--min-ranks", 1, "--rdzv-endpoint", endpoint]
    job = [member, tmp_path / "logs", [3] * 3 + [2] * 3]

    def logs():
        return list((tmp_path / "logs").iterdir())

    words += ["--secret-file", tmp_path / "secret"]
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)
    with ExitStack() as stack:
        one = stack.enter_context(started(tmp_path, *words, "--nproc-per-node", 1, *job))
        wait_until(lambda: listens(ports[0]))
        two = stack.enter_context(started(tmp_path, *words, "--nproc-per-node", 2, *job))
        wait_until(lambda: any(path.read_text().count(" 3 ") >= 3 for path in logs()))
        os.kill(one.pid, signal.SIGKILL)
        code, told = two.end(60)
    assert code == 0, told


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex((LOCAL, port)) == 0


def test_a_joining_host_without_the_secret_is_refused(tmp_path):
    path = script(tmp_path, "")
    with serving() as (host, port):
        words = ["--nnodes", 2, "--rdzv-endpoint", f"{host}:{port}", "--secret-file", tmp_path / "secret", path]
        with pytest.raises(UserError, match="cannot be read"):
            run(*words)
        (tmp_path / "secret").write_text(SECRET[::-1])
        (tmp_path / "secret").chmod(0o600)
        with pytest.raises(UserError, match="the same secret, and each job a port of its own"):
            run(*words)
        (tmp_path / "secret").write_bytes(bytes(range(128, 200)))
        with pytest.raises(UserError, match="is not text"):
            run(*words)


@contextmanager
def serving():
    coordinator = Coordinator(SECRET.encode()).start()
    yield coordinator.address
    coordinator.stop()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--min-ranks", "2"], "--min-ranks 2 can't be met: .* has 1 to 1 ranks"),
        (["--min-ranks", "0", "--nproc-per-node", "2"], "--min-ranks 0 can't be met"),
        (["--nnodes", "2:4"], "--nnodes 2:4 is for several hosts.*--rdzv-endpoint"),
        (["--nnodes", "4:2", "--rdzv-endpoint", "h:1"], "--nnodes 4:2 is not MIN:MAX"),
        (["--nproc-per-node", "300"], "300 ranks are more than the 256"),
        (["--rdzv-backend", "etcd"], "--rdzv-backend etcd can't be used"),
        (["--standalone", "--rdzv-endpoint", "h:1"], "--standalone is for one host"),
        (["--rdzv-endpoint", "h", "--nnodes", "2"], "--rdzv-endpoint has 'h', which is not HOST:PORT"),
        (["--rdzv-conf", "timeout=3"], "only join_timeout=SECONDS"),
        (["--rdzv-conf", "join_timeout=nan"], "only join_timeout=SECONDS"),
        (["--tee", "3"], "--tee has no effect with --fault-tolerance"),
        (["--max-restarts", "-1"], "--max-restarts -1 is no number of times"),
        (["--secret-file", "s"], "--secret-file s is for several hosts"),
        (["--local-addr", "192.0.2.1"], "--local-addr 192.0.2.1 is no address of this host"),
        (["--signals-to-handle", "SIGFOO"], "SIGFOO.*is no signal"),
        (["-m", "--no-python"], "exclude each other"),
        (["--no-python"], "can't be started"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROMESH_SECRET", SECRET)
    path = script(tmp_path, "")
    with pytest.raises(UserError, match=sentence):
        run(*words, path)


def test_flags_of_fault_tolerance_alone_are_refused(tmp_path):
    for words in (["--min-ranks", "1"], ["--secret-file", "s"]):
        with pytest.raises(UserError, match=f"{words[0]} is for jobs that outlive their ranks"):
            launcher.main([*words, str(script(tmp_path, ""))])


def test_several_hosts_need_a_secret(tmp_path, monkeypatch):
    monkeypatch.delenv("HETEROMESH_SECRET", raising=False)
    with pytest.raises(UserError, match="no secret is given: name a file with --secret-file"):
        run("--nnodes", 2, "--rdzv-endpoint", f"{LOCAL}:1", script(tmp_path, ""))


def test_the_environment_is_read_as_it_was_written(monkeypatch):
    coordinators = [("10.0.0.1", 29400), ("::1", 5)]
    variables = environment_of(
        coordinators=coordinators,
        secret=SECRET,
        name="h:3",
        hosts=["10.0.0.7", "10.1.0.7"],
        bounds=Bounds(min=2, max=8),
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = partial(join_options, facts={"model": "m"})
    read = options(step=4, state="s")
    assert (read.coordinators, read.secret, read.name) == (coordinators, SECRET.encode(), "h:3")
    assert (read.hosts, read.facts, read.step, read.state) == (["10.0.0.7", "10.1.0.7"], {"model": "m"}, 4, "s")
    assert bounds_from_environment() == Bounds(min=2, max=8)
    assert read.place is None
    monkeypatch.setenv("HETEROMESH_MEMBER_PLACE", "5")
    assert options().place == 5
    for name in variables:
        with monkeypatch.context() as patch:
            patch.delenv(name)
            with pytest.raises(UserError, match=f"{name} is not set.*heteromesh run --fault-tolerance"):
                (bounds_from_environment if name.endswith("MEMBERS") else options)()
    for name, value, sentence in (
        ("HETEROMESH_COORDINATORS", "10.0.0.1:29400,h", "HETEROMESH_COORDINATORS has 'h'"),
        ("HETEROMESH_SECRET", "short", "has 5 bytes and needs 16"),
        ("HETEROMESH_MEMBER_HOSTS", "a,,b", "has an empty address"),
        ("HETEROMESH_MEMBERS", "8:2", "HETEROMESH_MEMBERS=8:2 is not LEAST:MOST"),
        ("HETEROMESH_MEMBER_PLACE", "a", "HETEROMESH_MEMBER_PLACE=a is no rank"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UserError, match=sentence):
                (bounds_from_environment if name.endswith("MEMBERS") else options)()


@pytest.mark.parametrize("text", ["", "h", "h:", ":1", "h:0", "h:65536", "h:x", "::1:5", "h:1,", "h:²"])
def test_addresses_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"flag has .* is not HOST:PORT"):
        parse_addresses(text, "flag")


def test_addresses_are_read_as_they_are_written():
    addresses = [("h", 1), ("::1", 65535)]
    assert parse_addresses(",".join(map(join_address, addresses)), "flag") == addresses
