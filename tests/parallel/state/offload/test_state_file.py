"""The disk tier's file: what is written is read, and files that are cut, foreign, left over or too large are told."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import uuid
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.state.offload import state_file
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW
from heteromesh.parallel.state.offload.state_file import BLOCK, StateFile, aligned_buffer
from offload_plans import random_plan


@pytest.fixture
def pieces(monkeypatch):
    """Small pieces, so that a record takes several."""
    monkeypatch.setattr(state_file, "PIECE", 2 * BLOCK)


def test_records_come_back_bit_for_bit(tmp_path, pieces):
    file, buffer = StateFile(tmp_path, 3, 5000), aligned_buffer(5000)
    values = [torch.randn(5000) for _ in range(3)]
    for record in (2, 0, 1):
        buffer[:5000] = values[record]
        file.write(record, buffer)
    for record in range(3):
        file.read(record, buffer)
        assert torch.equal(buffer[:5000], values[record])
    file.check()
    file.close()
    assert list(tmp_path.iterdir()) == []
    assert buffer.data_ptr() % BLOCK == 0


def test_id_whose_bytes_are_no_number_is_known_again(tmp_path, monkeypatch):
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(bytes=b"\xff" * 16))
    StateFile(tmp_path, 1, 10).check()


def test_without_direct_io_the_page_cache_is_used_and_named(tmp_path, monkeypatch, caplog):
    real = os.open

    def refuse(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level("WARNING"):
        file = StateFile(tmp_path, 1, 10)
    assert not file.direct
    assert "no direct I/O" in caplog.text
    buffer = aligned_buffer(10)
    buffer[:] = 3
    file.write(0, buffer)
    buffer[:] = 0
    file.read(0, buffer)
    assert buffer[:10].tolist() == [3] * 10


def test_direct_io_refused_at_the_first_write(tmp_path, monkeypatch, caplog):
    real, refused = os.pwritev, []

    def refuse(*args):
        if not refused:
            refused.append(args)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(*args)

    monkeypatch.setattr(os, "pwritev", refuse)
    with caplog.at_level("WARNING"):
        file = StateFile(tmp_path, 1, 10)
    assert not file.direct
    file.check()


def refuse_to_reserve(*_: object) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


def test_file_system_that_reserves_nothing_is_written_once(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(os, "posix_fallocate", refuse_to_reserve)
    file = StateFile(tmp_path, 3, 5000)
    file.check()
    buffer = aligned_buffer(5000)
    buffer[:] = 1
    file.read(2, buffer)
    assert not buffer[:5000].any()
    with file_size_limit(30_000), pytest.raises(UserError, match="no space"):
        StateFile(tmp_path, 3, 5000)
    assert list(tmp_path.iterdir()) == [file.path]
    file.close()


@contextmanager
def file_size_limit(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_without_space_is_told_before_the_first_step_and_nothing_is_lost(tmp_path):
    parameter = nn.Parameter(torch.ones(100_000))
    optimizer = OffloadedAdamW([parameter], plan=random_plan(0, ("disk",)), state_folder=tmp_path)
    parameter.grad = torch.ones(100_000)
    with file_size_limit(300_000), pytest.raises(UserError, match=r"no space for 0\.\d+ GB of optimizer state .*disk"):
        optimizer.step()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(parameter, torch.ones(100_000))
    optimizer.step()  # with space it goes on
    assert not torch.equal(parameter, torch.ones(100_000))


def test_folder_that_can_not_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name a folder on a local disk"):
        StateFile(tmp_path / "file", 1, 10)


def damaged(tmp_path):
    """An optimizer that has made a step, its file, and the parameter."""
    parameter = nn.Parameter(torch.ones(3000))
    optimizer = OffloadedAdamW([parameter], plan=random_plan(1, ("disk",)), state_folder=tmp_path)
    parameter.grad = torch.ones(3000)
    optimizer.step()
    (path,) = tmp_path.iterdir()
    return optimizer, path, parameter


def cut(path, tmp_path):
    os.truncate(path, path.stat().st_size - BLOCK)


def replace(path, tmp_path):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def overwrite_by_another_run(path, tmp_path):
    other = StateFile(tmp_path / "other", 1, 10)
    with path.open("r+b") as file:
        file.write(other.path.read_bytes()[:BLOCK])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"has \d+ bytes where \d+ were written"),
        (replace, "is of another run"),
        (overwrite_by_another_run, "is of another run"),
        (lambda path, _: path.unlink(), "is gone"),
    ],
)
def test_file_that_is_not_what_was_written_is_refused_before_anything_changes(tmp_path, damage, message):
    optimizer, path, parameter = damaged(tmp_path)
    before = parameter.detach().clone()
    damage(path, tmp_path)
    with pytest.raises(UserError, match=f"{message}.*resume from the last checkpoint"):
        optimizer.step()
    assert torch.equal(parameter, before)


def test_file_that_ends_while_it_is_read(tmp_path):
    file = StateFile(tmp_path, 2, 3000)
    cut(file.path, tmp_path)
    with pytest.raises(UserError, match="ends at"):
        file.read(1, aligned_buffer(3000))


def test_files_of_runs_that_were_killed_are_removed_and_those_of_living_ones_and_strangers_are_not(tmp_path):
    living = StateFile(tmp_path, 1, 10)
    strange = tmp_path / "optimizer-notes.state"
    strange.write_text("mine")
    child = os.fork()
    if child == 0:
        abandoned = StateFile(tmp_path, 1, 10)
        os._exit(0 if abandoned.path.exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(tmp_path.iterdir())) == 3
    mine = StateFile(tmp_path, 1, 10)
    assert set(tmp_path.iterdir()) == {living.path, mine.path, strange}


def test_flipped_order_reads_and_writes_less(tmp_path, monkeypatch):
    parameter = nn.Parameter(torch.ones(64 * 10))
    plan = random_plan(0, ("disk",))(640)
    plan = dataclasses.replace(plan, ring=4)
    count = len(plan.subgroups)
    assert count > 4
    optimizer = OffloadedAdamW([parameter], plan=lambda _: plan, state_folder=tmp_path)
    moved = {"read": 0, "write": 0}
    for name in moved:
        real = getattr(StateFile, name)

        def counted(self, record, buffer, real=real, name=name):
            moved[name] += 1
            real(self, record, buffer)

        monkeypatch.setattr(StateFile, name, counted)
    seen = []
    for _ in range(4):
        moved.update(read=0, write=0)
        parameter.grad = torch.ones(640)
        optimizer.step()
        seen.append(dict(moved))
    assert seen[1:] == [{"read": count - 4, "write": count - 4}] * 3
