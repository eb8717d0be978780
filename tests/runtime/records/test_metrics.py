"""Lines are written whole, also where the disk is full."""

import json
import multiprocessing
import resource
import signal
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.runtime.records.metrics import JsonLines, truncate_lines
from heteromesh.runtime.records.rundir import RunDirectory


def fill(path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    lines, failed = JsonLines(path), 0
    for step in range(20):
        try:
            lines.write({"step": step, "text": "x" * 10})
        except OSError:
            failed += 1
    assert failed


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path / "lines",))
    process.start()
    process.join()
    assert process.exitcode == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "lines").read_text().splitlines()]
    assert steps == list(range(len(steps)))
    assert steps


def test_lines_of_a_writer_that_was_replaced_stay_out(tmp_path: Path) -> None:
    """One that was stopped, and wakes up when another has taken over."""
    old = JsonLines(tmp_path / "lines")
    old.write({"step": 1})
    truncate_lines(tmp_path / "lines", 1)
    old.write({"step": 2})
    old.close()
    assert (tmp_path / "lines").read_text() == '{"step": 1}\n'


def unwritable(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with pytest.raises(UserError, match="can't be written"):
        RunDirectory(path, resume=False)


def test_a_full_disk_is_found_and_nothing_is_left_of_the_try(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=unwritable, args=(tmp_path / "run",))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
