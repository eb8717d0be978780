"""`heteromesh run` on one host: who can reach it, what is left of it, and how its workers are started again."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_launch import ENVIRONMENT, TRAIN, children, free_port, heteromesh

from heteromesh.errors import UserError
from heteromesh.runtime.launch.loopback import BACKEND, LoopbackRendezvous, stay_on_loopback

LISTEN = """
    import json, os, sys
    import torch.distributed as dist

    def listening(pid):
        inodes = set()
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
            except OSError:
                pass
        found = []
        for table in ("tcp", "tcp6"):
            for line in open(f"/proc/net/{table}").readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    found.append(fields[1].rpartition(":")[0])
        return found

    dist.init_process_group("gloo")
    dist.barrier()
    text = json.dumps({"launcher": listening(os.getppid()), "worker": listening(os.getpid())})
    os.write(1, (text + chr(10)).encode())
    dist.barrier()
    dist.destroy_process_group()
"""
RESTART = """
    import os, sys, torch, heteromesh as hm
    from llama import Llama, LlamaConfig
    torch.manual_seed(1)
    data = [torch.arange(2 + 31 * i % 70) % 61 for i in range(40)]
    model = Llama(LlamaConfig(vocab=61, layers=1, hidden=32, heads=4, kv_heads=2, intermediate=48))
    config = hm.TrainerConfig(batch_tokens=150, max_steps=8, run_dir=sys.argv[1], checkpoint_every=2)

    class Fails(hm.Hook):
        def step_committed(self, step):
            if step.metrics.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os._exit(1)

    assert hm.is_first() == (os.environ["RANK"] == "0")
    print("losses", list(hm.Trainer(model, None, data, config, hooks=[Fails()]).fit().losses), flush=True)
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def script(folder: Path, text: str) -> Path:
    path = folder / "worker.py"
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize("words", [[], ["--master-port", "PORT"]])
def test_nothing_listens_for_other_hosts(words: list[str], tmp_path: Path) -> None:
    words = [str(free_port()) if word == "PORT" else word for word in words]
    result = heteromesh("--nproc-per-node", 2, *words, script(tmp_path, LISTEN))
    assert result.returncode == 0, result.stderr
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(told) == 2
    for rank in told:
        assert rank["launcher"], "the store"
        assert {address for who in rank.values() for address in who} == {"0100007F"}, rank


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    rendezvous = LoopbackRendezvous("job", 0)
    held = rendezvous.next_rendezvous()
    port = held.bootstrap_store_info.master_port
    with pytest.raises(UserError, match=f"port {port} can't be listened on"):
        LoopbackRendezvous("job", port).next_rendezvous()


def test_every_start_of_the_workers_has_a_store_of_its_own() -> None:
    rendezvous = LoopbackRendezvous("job", 0)
    first = rendezvous.next_rendezvous()
    first.store.set("key", "old")
    assert not rendezvous.next_rendezvous().store.check(["key"])


@pytest.mark.parametrize("changes", [{"standalone": True}, {"rdzv_endpoint": "localhost:0"}, {"rdzv_backend": "c10d"}])
def test_every_way_to_ask_for_one_host_stays_on_loopback(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    usual = {"nnodes": "1", "rdzv_backend": "static", "rdzv_endpoint": "", "standalone": False, "master_port": None}
    options = SimpleNamespace(**usual | changes)
    assert stay_on_loopback(options)
    assert options.rdzv_backend == BACKEND


@pytest.mark.parametrize(
    ("hosts", "backend", "kept"), [("2", "c10d", True), ("1:2", "static", True), ("1", "etcd", True)]
)
def test_several_hosts_and_other_rendezvous_stay_torchruns(hosts: str, backend: str, kept: bool) -> None:
    options = SimpleNamespace(
        nnodes=hosts, rdzv_backend=backend, rdzv_endpoint="a:1", standalone=False, master_port=None
    )
    assert not stay_on_loopback(options)
    assert options.rdzv_backend == backend
    assert backend != BACKEND


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    metrics = tmp_path / "run/metrics.jsonl"
    command = [sys.executable, "-m", "heteromesh", "run", "--nproc-per-node", "2", str(script(tmp_path, TRAIN))]
    process = subprocess.Popen([*command, str(tmp_path / "run"), "1000000"], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        limit = time.monotonic() + 100
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert time.monotonic() < limit
            time.sleep(0.05)
        family = children(process.pid)
        assert len(family) >= 4, "two ranks, a planner and the reaper"
    finally:
        process.kill()
        process.wait()
    while left := [pid for pid in family if lives(pid)]:
        assert time.monotonic() < limit + 60, left
        time.sleep(0.05)


@pytest.mark.parametrize("module", ["heteromesh", "torch.distributed.run"])
def test_workers_that_are_started_again_go_on_from_the_checkpoint(module: str, tmp_path: Path) -> None:
    words = ["--nproc-per-node", 2, "--max-restarts", 1, script(tmp_path, RESTART), tmp_path / "run"]
    result = heteromesh(*words, module=module)
    assert result.returncode == 0, result.stderr
    assert re.search(r"resumed from .* at step [24]\n", result.stdout), "the one of step 4 may have been under way"
    assert result.stdout.count("losses") == 2
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    assert json.loads((tmp_path / "run/finished.json").read_text()) == {"step": 8}


def test_a_killed_agent_leaves_no_folder(tmp_path: Path) -> None:
    path = script(tmp_path, "import os, sys, time\nopen(sys.argv[1] + '/up', 'w').close()\ntime.sleep(1000)\n")
    command = [sys.executable, "-m", "heteromesh", "run", "--fault-tolerance", str(path), str(tmp_path)]
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(command, env={**ENVIRONMENT, "TMPDIR": str(tmp_path / "tmp")})
    limit = time.monotonic() + 100
    try:
        while not (tmp_path / "up").exists():
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert list((tmp_path / "tmp").glob("heteromesh-*"))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    while list((tmp_path / "tmp").glob("heteromesh-*")):
        assert time.monotonic() < limit + 60
        time.sleep(0.05)
