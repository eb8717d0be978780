"""Lines are written whole, also where the disk is full."""

import json
import multiprocessing
import resource
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from heteromesh.errors import UserError
from heteromesh.runtime.records.metrics import JsonLines, StepMetrics, Tensorboard, truncate_lines
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


STEP = StepMetrics(**dict.fromkeys((field.name for field in fields(StepMetrics)), 1))


def test_a_broken_tensorboard_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboard.py").write_text("raise ImportError('no protobuf')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    written = Tensorboard(tmp_path / "run", 0)
    written.write(STEP)
    written.close()
    assert not (tmp_path / "run").exists()


class Failing(threading.Thread):
    """TensorBoard's thread, which writes its files, ends with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.start()
        self.join()

    def run(self) -> None:
        raise self.error


Failing.__module__ = "tensorboard.summary.writer.event_file_writer"


class Writer:
    """What torch's SummaryWriter does where its directory has been deleted."""

    def __init__(self, directory: str, purge_step: int) -> None:
        self._error = FileNotFoundError(2, "gone")

    def add_scalar(self, *_: object) -> None:
        raise Failing(self._error).error

    def close(self) -> None:
        raise self._error


def test_a_failed_write_of_tensorboards_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    (tmp_path / "tensorboard.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    written = Tensorboard(tmp_path / "run", 0)
    with pytest.raises(FileNotFoundError, match="gone"):
        written.write(STEP)
    assert told == []
    Failing(ValueError("a defect"))
    assert len(told) == 1, "what is no failed write is shown"
    written.close()
    assert threading.excepthook == told.append


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
