"""Processes that are started again: what they need, what they leave alone, and when they have nothing to do."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from elastic_jobs import STEPS, Job, check_ledger, eventually, rows
from heteromesh.faults.membership.membership import Bounds
from trainers import make_trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, ...]:
    """The losses of one process that knows nothing of faults."""
    return make_trainer(tmp_path_factory.mktemp("alone") / "run", max_steps=STEPS).fit().losses


def flip_all(folder: Path) -> int:
    """Flips a bit of every checkpoint; returns of how many."""
    shards = list(folder.glob("checkpoints/step-*/*.distcp"))
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    return len(shards)


def test_one_that_can_not_read_a_checkpoint_gets_the_state_of_the_others(
    alone: tuple[float, ...], tmp_path: Path
) -> None:
    """And it leaves the folder alone: the part that the writer is at stays."""
    with Job(tmp_path, least=2, gather=5.0) as job:
        membership = job.coordinator.membership
        job.start(0, waits_in=6, checkpoint_every=2)
        eventually(lambda: len(membership.people) == 1)
        job.start(1, dies_in=6, checkpoint_every=2)
        eventually(lambda: membership.started)
        membership.bounds = Bounds(min=1)
        assert job.result(1) is None
        part = tmp_path / "run/checkpoints/step-00000099.x.part"
        eventually(lambda: flip_all(tmp_path / "run"))
        part.mkdir()
        job.start(2, restarts=1, checkpoint_every=2)
        eventually(lambda: membership.counts["joined"] == 3)
        assert part.exists()
        (tmp_path / "go").touch()
        (losses, digest), (late, same) = job.result(0), job.result(2)
    assert losses == pytest.approx(alone, abs=1e-3)
    assert late == losses[-len(late) :]
    assert digest == same
    check_ledger(tmp_path)
    assert "worker host:2, started again, has joined after step" in (tmp_path / "host:2.txt").read_text()


def test_where_nobody_can_read_a_checkpoint_that_is_told(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=2).fit()
    flip_all(tmp_path / "run")
    with Job(tmp_path) as job:
        job.start(0, restarts=1)
        told = job.result(0)
    assert told.startswith("UserError: run directory ")
    assert "has no whole checkpoint: checkpoint step-00000002 is damaged" in told
    assert len(rows(tmp_path / "run/metrics.jsonl")) == 2, "nothing was trained over it"


def test_one_that_comes_after_the_end_trains_nothing(tmp_path: Path) -> None:
    with Job(tmp_path) as job:
        job.start(0, checkpoint_every=5)
        assert isinstance(job.result(0), tuple)
        before = (tmp_path / "run/metrics.jsonl").read_text()
        for index, mark in ((1, True), (2, False)):
            if not mark:
                (tmp_path / "run/finished.json").unlink()  # another file system may show it later
            job.start(index, restarts=1, checkpoint_every=5)
            assert job.result(index).strip().endswith("SystemExit: 0")
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    more = make_trainer(tmp_path / "run", max_steps=STEPS + 1, resume=True)
    assert len(more.fit().losses) == 1, "who asks for more steps gets them"


def test_a_second_job_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with Job(tmp_path) as one, Job(tmp_path) as other:
        one.start(0, waits_in=4)
        eventually(lambda: (tmp_path / "run/metrics.jsonl").exists())
        other.start(0, resume="auto")
        assert "is written by another run (process " in other.result(0)
        (tmp_path / "go").touch()
        assert isinstance(one.result(0), tuple)


def test_auto_begins_anew_and_goes_on(alone: tuple[float, ...], tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "run", max_steps=4, resume="auto").fit()
    assert first.losses == pytest.approx(alone[:4])
    second = make_trainer(tmp_path / "run", max_steps=STEPS, resume="auto").fit()
    assert second.losses == pytest.approx(alone[4:], abs=1e-3)


def test_a_pair_whose_last_holder_is_lost_goes_on_from_the_checkpoint(alone: tuple[float, ...], tmp_path: Path) -> None:
    """One joins and has no state yet; the only one that has it dies. Those who are started again go on."""
    with Job(tmp_path, gather=1.0) as job:
        job.start(0, checkpoint_every=2, waits_in=6)
        eventually(lambda: list((tmp_path / "run/checkpoints").glob("step-*4")))
        os.kill(job.processes[0].pid, signal.SIGSTOP)
        job.start(1, restarts=1, checkpoint_every=2)
        eventually(lambda: job.coordinator.membership.counts["joined"] == 2)
        os.kill(job.processes[0].pid, signal.SIGKILL)
        result: Any = job.result(1)
        if isinstance(result, str):  # it was in an epoch with the one that died
            assert result.startswith("PeerLost: no member holds the state after step "), result
            job.start(2, restarts=2, checkpoint_every=2)
            result = job.result(2)
    assert result[0] == pytest.approx(alone[-len(result[0]) :], abs=1e-3)
    check_ledger(tmp_path)
