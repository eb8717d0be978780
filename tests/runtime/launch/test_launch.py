"""`heteromesh run` as a user types it: torchrun's behaviour, plan and cluster files, exit codes, signals."""

import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from heteromesh.planner.cluster.cluster import local_cluster
from heteromesh.planner.plan import Plan, PlannedCluster, dump
from heteromesh.runtime.cli.main import main

EXAMPLES = Path(__file__).parents[3] / "examples"
CLUSTER = '[[hosts]]\nnames = ["a"]\ndevice = "cpu"\ncount = {ranks}\n'
PATHS = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
TRAIN = """
    import sys, torch, heteromesh as hm
    from llama import Llama, LlamaConfig
    folder, steps = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(1)
    data = [torch.arange(2 + 31 * i % 70) % 61 for i in range(40)]
    model = Llama(LlamaConfig(vocab=61, layers=1, hidden=32, heads=4, kv_heads=2, intermediate=48))
    config = hm.TrainerConfig(batch_tokens=150, max_steps=steps, run_dir=folder, resume="resume" in sys.argv)
    report = hm.Trainer(model, None, data, config).fit()
    print("losses", list(report.losses), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(TRAIN))
    return path


def heteromesh(*words: object, module: str = "heteromesh", seconds: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *(["run"] if module == "heteromesh" else []), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=ENVIRONMENT)


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that the user can mend."""
    assert result.returncode == 2, result.stderr
    return one_line(result.stderr)


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("heteromesh: error: ")
    return lines[0]


def refused(*words: object) -> str:
    """The sentence of a mistake that is found before any process starts."""
    with redirect_stderr(io.StringIO()) as told:
        assert main(["run", *map(str, words)]) == 2
    return one_line(told.getvalue())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_script_that_knows_nothing_of_heteromesh_runs_as_under_torchrun(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.py"
    foreign.write_text(
        textwrap.dedent("""
        import json, os, sys
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "OMP_NUM_THREADS"]
        text = json.dumps({"env": {n: os.environ.get(n) for n in names}, "argv": sys.argv[1:]})
        os.write(1, (text + chr(10)).encode())  # in one piece: the ranks share the terminal
        sys.exit(3 if "fail" in sys.argv else 0)
        """)
    )
    words = ["--nproc_per_node", "2", "--max-restarts=0", foreign, "--plan", "mine", "x"]
    ours, theirs = heteromesh(*words), heteromesh(*words, module="torch.distributed.run")
    assert ours.returncode == theirs.returncode == 0
    assert sorted(ours.stdout.splitlines()) == sorted(theirs.stdout.splitlines())
    assert json.loads(ours.stdout.splitlines()[0])["argv"] == ["--plan", "mine", "x"]
    failed = heteromesh("--nproc-per-node", "2", foreign, "fail")
    assert failed.returncode == 1
    assert "exitcode  : 3" in failed.stderr


def test_help_names_torchruns_flags_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--nproc-per-node", "--rdzv-endpoint", "--standalone", "--cluster", "--plan", "--dry-run"):
        assert flag in text


def test_plain_torchrun_works_with_trainer(script: Path, tmp_path: Path) -> None:
    result = heteromesh("--nproc-per-node", 2, script, tmp_path / "run", 3, module="torch.distributed.run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("losses") == 2


def test_bad_files_are_told_in_one_sentence(script: Path, tmp_path: Path) -> None:
    cluster, plan = tmp_path / "cluster.toml", tmp_path / "plan.json"
    cluster.write_text(CLUSTER.format(ranks=3))
    broken = tmp_path / "broken.toml"
    broken.write_text('[[hosts]]\nnames = ["a"\n')
    dump(Plan(cluster=PlannedCluster(fingerprint="0" * 16, ranks=2), model="m"), plan)
    run = [script, tmp_path / "run", 1]
    assert "does not exist" in sentence(heteromesh(tmp_path / "none.py"))
    assert "unrecognized arguments: --bogus" in refused("--bogus", *run)
    assert "--nproc-per-node nine" in refused("--nproc-per-node", "nine", *run)
    assert "give at least 1" in refused("--nproc-per-node", "0", *run)
    assert "--nnodes many" in refused("--nnodes", "many", *run)
    assert "3 ranks" in refused("--nproc-per-node", 2, "--cluster", cluster, *run)
    assert "line" in refused("--cluster", broken, *run)
    assert "none.json does not exist" in refused("--plan", tmp_path / "none.json", *run)
    assert "plan file" in refused("--nproc-per-node", 3, "--plan", plan, *run)
    # the file names another cluster than the flags: every rank finds it, and it is told once
    assert "make the plan again" in sentence(heteromesh("--nproc-per-node", 2, "--plan", plan, *run))
    assert not (tmp_path / "run").exists()


def test_a_mistake_before_the_trainer_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    dry = heteromesh("--dry-run", EXAMPLES / "train.py", "--data", tmp_path / "empty", "--run-dir", tmp_path / "run")
    assert str(tmp_path / "empty") in sentence(dry)
    bare = [sys.executable, str(EXAMPLES / "train.py"), "--data", str(tmp_path / "none"), "--run-dir", str(tmp_path)]
    result = subprocess.run(bare, capture_output=True, text=True, timeout=150, env=ENVIRONMENT)
    assert "none" in sentence(result)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a dry run for two ranks."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "train.py").write_text(textwrap.dedent(TRAIN))
    result = heteromesh("--dry-run", "--nproc-per-node", 2, folder / "train.py", folder / "dry", 5)
    assert result.returncode == 0, result.stderr
    assert "nothing was trained" in result.stdout
    assert not (folder / "dry/metrics.jsonl").exists()
    return folder / "dry"


def test_dry_run_plans_for_more_ranks_and_its_plan_can_be_run(dry: Path, script: Path, tmp_path: Path) -> None:
    plan = json.loads((dry / "plan.json").read_text())
    assert plan["cluster"] == {"fingerprint": local_cluster(2).fingerprint, "ranks": 2}
    run = heteromesh("--nproc-per-node", 2, "--plan", dry / "plan.json", script, tmp_path / "run", 5)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/plan.jsonl").read_text().splitlines()]
    assert len(rows) == 5, "beyond the file's three steps it plans anew"
    assert [row["plan"]["passes"] for row in rows[:3]] == [step["passes"] for step in plan["steps"]]


def test_a_plan_for_other_data_is_refused(dry: Path, script: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(script.read_text().replace("batch_tokens=150", "batch_tokens=90"))
    run = ["--nproc-per-node", 2, "--plan", dry / "plan.json", other, tmp_path / "run", 2]
    message = sentence(heteromesh(*run))
    assert "step 0 of the plan file is for" in message


def children(pid: int) -> list[int]:
    """All descendants that are still alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found += [int(entry.parent.name), *children(int(entry.parent.name))]
    return found


def interrupt(number: signal.Signals, group: bool, metrics: Path, words: Sequence[object]) -> str:
    """Starts the command, sends the signal two steps later, and checks the end; what was printed."""
    begun = metrics.read_text().count("\n") if metrics.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "heteromesh", "run", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > begun + 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        family = children(process.pid)
        assert len(family) >= 3, "two ranks and a planner"
        os.killpg(process.pid, number) if group else process.send_signal(number)
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    return out


def test_a_signal_saves_and_leaves_no_child(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM as a scheduler sends it, to the launcher; Ctrl-C as a terminal does, to the whole group."""
    folder, done = tmp_path / "run", 0
    for number, group in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        words = ["--nproc-per-node", 2, script, folder, 1_000_000, *(["resume"] if done else [])]
        out = interrupt(number, group, folder / "metrics.jsonl", words)
        assert not done or f"at step {done}" in out
        (done,) = map(int, re.findall(r"stopped by signal \d+ after step (\d+)", out))
        assert (folder / f"checkpoints/step-{done:08d}/meta.json").exists()
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), str(done + 2), "resume"])
    runpy.run_path(str(script))
    assert f"at step {done}" in capsys.readouterr().out


def test_hosts_may_start_different_numbers_of_processes(script: Path, tmp_path: Path) -> None:
    """Two launchers on loopback stand for two hosts, one with one process and one with two."""
    endpoint = f"127.0.0.1:{free_port()}"

    def start(processes: int) -> subprocess.Popen[str]:
        flags = ["--nnodes", "2", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-id", "t"]
        command: Sequence[str] = [sys.executable, "-m", "heteromesh", "run", *flags, "--rdzv-endpoint", endpoint]
        run = [*command, "--local-addr", "127.0.0.1", str(script), str(tmp_path / "run"), "3"]
        return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    hosts = [start(1), start(2)]
    try:
        outputs = [host.communicate(timeout=150) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert sum(out.count("losses") for out, _ in outputs) == 3
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["ranks"] == 3
    assert sorted(config["costs"]["hosts"]) in ([0, 0, 1], [0, 1, 1])
