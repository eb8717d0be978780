"""One job writes a run directory; what holds it ends with its processes."""

import json
import os
import signal
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.runtime.records.run_lock import LOCK, RunLock
from heteromesh.runtime.records.rundir import RunDirectory, finished_step


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run", resume=False)
    first.start({}, 0)
    with pytest.raises(UserError, match=rf"is written by another run \(process {os.getpid()} on host .*: wait until"):
        RunDirectory(tmp_path / "run", resume=True)
    first.close()
    RunDirectory(tmp_path / "run", resume=True).close()


def test_processes_of_one_job_may_all_get_to_write(tmp_path: Path) -> None:
    locks = [RunLock(tmp_path, "a"), RunLock(tmp_path, "a")]
    locks[0].close()
    with pytest.raises(UserError, match="is written by another run"):
        RunLock(tmp_path, "b")
    locks[1].close()
    RunLock(tmp_path, "b").close()


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        RunLock(tmp_path)
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    with pytest.raises(UserError, match=f"process {child} on host"):
        RunLock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    RunLock(tmp_path).close()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("text", ["", "null", "[1]"])
def test_a_lock_that_says_nothing_is_one(text: str, tmp_path: Path) -> None:
    held = RunLock(tmp_path, "a")
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(UserError, match="is written by another run"):
        RunLock(tmp_path, "b")
    held.close()


def test_a_finished_run_is_marked_until_it_is_gone_on_with(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "run", resume=False)
    folder.start({}, 0)
    assert finished_step(folder.path) is None
    folder.finished(7)
    folder.close()
    assert finished_step(folder.path) == 7
    more = RunDirectory(tmp_path / "run", resume="auto")
    more.start({}, 7)
    assert finished_step(folder.path) is None
    more.close()
    (folder.path / "finished.json").write_text(json.dumps(None))
    assert finished_step(folder.path) is None
