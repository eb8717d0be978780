"""Training with fault tolerance and shards, of the optimizer's state or of the weights too: members die and join, the
losses, the state and the weights stay.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from elastic_jobs import STEPS, Job, check_ledger, eventually, through_losses_and_a_join
from heteromesh.faults.membership.membership import Bounds
from trainers import make_trainer


@pytest.mark.parametrize("options", [{"shard_optimizer": True}, {"shard_weights": True, "in_backward": True}], ids=str)
def test_losses_stay_and_ordinary_runs_resume_either_way(options: dict[str, Any], tmp_path: Path) -> None:
    alone = make_trainer(tmp_path / "alone", max_steps=STEPS + 2).fit().losses
    make_trainer(tmp_path / "run", max_steps=2).fit()
    (losses, digest), (late, same) = through_losses_and_a_join(tmp_path, resume=True, checkpoint_every=5, **options)
    assert losses == pytest.approx(alone[2:STEPS][-len(losses) :], abs=1e-3)
    assert late == losses[-len(late) :]
    assert digest == same, "the same bits on all members"
    check_ledger(tmp_path)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())[-1] == f"step-{STEPS:08d}"
    more = make_trainer(tmp_path / "run", max_steps=STEPS + 2, resume=True).fit().losses
    assert more == pytest.approx(alone[STEPS:], abs=1e-3)


@pytest.mark.parametrize(
    ("setting", "lost"),
    [
        ("shard_optimizer", "were lost at once"),
        (
            "shard_weights",
            "were lost at once, and with them both copies of a part of the weights and the optimizer state",
        ),
    ],
)
def test_the_way_out_is_told_when_owner_and_mirror_are_lost(setting: str, lost: str, tmp_path: Path) -> None:
    with Job(tmp_path, least=3) as job:
        for index in range(3):
            job.start(index, checkpoint_every=2, waits_in=6, **{setting: True})
        eventually(lambda: list((tmp_path / "run/checkpoints").glob("step-*4")))
        job.coordinator.membership.bounds = Bounds(min=1)
        for index in (1, 2):
            os.kill(job.processes[index].pid, signal.SIGKILL)
        (tmp_path / "go").touch()
        told = job.result(0)
    assert told.startswith("PeerLost: "), "an agent starts it again: the job goes on from its checkpoint"
    assert lost in told
    assert "step-00000004" in told
