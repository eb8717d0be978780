"""Checkpoints that bad luck, other processes and strangers have had their hands on."""

import fcntl
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from heteromesh.comm.records import Recorder
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.owner import Replicated
from heteromesh.runtime.records import checkpoint_files
from heteromesh.runtime.records.checkpoint import Checkpoints
from heteromesh.runtime.records.checkpoint_files import META, METADATA, MetadataReader, Superseded, damage, read_meta
from heteromesh.runtime.records.writer import CheckpointWriter


class Job:
    """A model with state, and what writes it to a folder."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.owner = Replicated(self.optimizer, self.model, [])
        self.folder = folder / "checkpoints"
        self.folder.mkdir(exist_ok=True)
        self.checkpoints = Checkpoints(self.folder, World(), keep)

    def step(self) -> None:
        self.model(torch.ones(4)).sum().backward()
        self.optimizer.step()

    def save(self, step: int) -> None:
        self.step()
        self.checkpoints.save(step, self.model, self.owner, {"step": step})
        self.checkpoints.wait()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def writer(self) -> CheckpointWriter:
        return CheckpointWriter(
            self.folder.parent,
            self.model,
            self.owner,
            lambda step, _: {"step": step},
            Recorder(),
            every=1,
            keep=2,
            together=None,
        )


@pytest.fixture
def job(tmp_path: Path) -> Any:
    made = Job(tmp_path)
    yield made
    made.checkpoints.close()


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_one_that_only_reads_leaves_the_checkpoint_in_progress_alone(job: Job) -> None:
    job.save(1)
    part = job.folder / "step-00000002.0123.part"
    part.mkdir()
    reader = Checkpoints(job.folder, World(), 2)
    assert reader.newest_whole() == (job.folder / "step-00000001", [])
    reader.load(job.folder / "step-00000001", job.model, job.owner)
    reader.close()
    assert part.exists()


def test_one_that_writes_removes_what_nobody_writes_any_more(tmp_path: Path) -> None:
    job = Job(tmp_path)
    living, dead = job.folder / "step-00000001.living.part", job.folder / "step-00000001.dead.part"
    living.mkdir()
    dead.mkdir()
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    job.save(2)
    assert job.names() == ["step-00000001.living.part", "step-00000002"]
    os.close(lock)
    job.checkpoints.close()


def test_a_writer_whose_checkpoint_another_one_removes_is_told_so(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = checkpoint_files.digest_of_file

    def taken(path: Path) -> Any:
        checkpoint_files.shutil.rmtree(path.parent)
        return digest(path)

    monkeypatch.setattr(checkpoint_files, "digest_of_file", taken)
    with pytest.raises(Superseded, match="another one writes now"):
        job.save(1)


@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA, META])
def test_a_flipped_bit_is_found_and_the_one_before_is_taken(name: str, job: Job) -> None:
    job.save(1)
    weights = job.model.weight.detach().clone()
    job.save(2)
    flip(job.folder / "step-00000002" / name)
    told: list[str] = []
    writer = job.writer()
    path, state = writer.resume(told.append)
    writer.close()
    assert (path.name, state) == ("step-00000001", {"step": 1})
    assert torch.equal(job.model.weight, weights)
    assert len(told) == 1
    assert told[0].startswith("checkpoint step-00000002 is damaged (")
    assert told[0].endswith("): going on from step-00000001, the newest one that is whole")


@pytest.mark.parametrize("missing", [META, METADATA, "__0_0.distcp"])
def test_where_none_is_whole_that_is_said(missing: str, job: Job) -> None:
    job.save(1)
    (job.folder / "step-00000001" / missing).unlink()
    writer = job.writer()
    with pytest.raises(UserError, match=r"has no whole checkpoint: checkpoint step-00000001 is damaged \("):
        writer.resume(print)
    writer.close()


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for step in (1, 2):
        job.save(step)
    job.checkpoints.close()
    flip(job.folder / "step-00000002/__0_0.distcp")
    later = Job(tmp_path)
    path, wrong = later.checkpoints.newest_whole()
    assert path is not None
    assert (path.name, len(wrong)) == ("step-00000001", 1)
    later.save(3)
    assert later.names() == ["step-00000001", "step-00000002", "step-00000003"]
    later.save(4)
    assert later.names() == ["step-00000003", "step-00000004"]
    later.checkpoints.close()


@pytest.mark.parametrize("text", ["null", "5", "[]", "{", '{"step": 1}', '{"step": 1, "parameters": 1, "trainer": {}}'])
def test_a_meta_file_that_is_none_is_told(text: str, job: Job) -> None:
    job.save(1)
    (job.folder / "step-00000001" / META).write_text(text)
    with pytest.raises(UserError, match="is incomplete"):
        read_meta(job.folder / "step-00000001")
    assert damage(job.folder / "step-00000001")


def test_changed_numbers_in_a_meta_file_are_found(job: Job) -> None:
    job.save(1)
    file = job.folder / "step-00000001" / META
    meta = json.loads(file.read_text())
    meta["trainer"]["step"] = 2
    file.write_text(json.dumps(meta))
    assert damage(file.parent) == f"{META} is missing or damaged"


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def test_metadata_of_a_stranger_runs_nothing(job: Job, tmp_path: Path) -> None:
    job.save(1)
    folder, trace = job.folder / "step-00000001", tmp_path / "ran"
    (folder / METADATA).write_bytes(pickle.dumps(Metadata({}, planner_data=Evil(trace))))
    with pytest.raises(pickle.UnpicklingError, match="only plain values"):
        MetadataReader(folder).read_metadata()
    with pytest.raises(UserError, match="incomplete or damaged"):
        job.checkpoints.load(folder, job.model, job.owner)
    assert not trace.exists()


def test_values_of_a_stranger_run_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path)
    trace = tmp_path / "ran"
    job.optimizer.param_groups[0]["note"] = Evil(trace)  # written by whoever pickles, as an attacker would
    job.checkpoints.save(1, job.model, job.owner, {"step": 1})
    job.checkpoints.close()
    trace.unlink(missing_ok=True)
    other = Job(tmp_path)
    other.optimizer.param_groups[0]["note"] = 0
    with pytest.raises(UserError, match="incomplete or damaged"):
        other.checkpoints.load(other.folder / "step-00000001", other.model, other.owner)
    other.checkpoints.close()
    assert not trace.exists()


def test_older_ones_go_when_the_new_one_is_on_the_disk(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.save(1)
    job.save(2)
    told: list[str] = []
    rename, durable = Path.rename, checkpoint_files.make_durable

    def renamed(self: Path, to: Path) -> Path:
        told.append(f"{self.name[:13]} renamed")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(checkpoint_files, "make_durable", lambda path: (told.append(path.name[:13]), durable(path)))
    monkeypatch.setattr(os, "fsync", lambda _, fsync=os.fsync: (told.append("file"), fsync(_)))
    job.save(3)
    told = [line for line in told if line != "file" and "metadata" not in line]
    assert told == ["step-00000003", "step-00000003 renamed", "checkpoints", "step-00000001 renamed"]
