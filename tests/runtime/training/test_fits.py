"""Several calls of `fit` in one process, one after the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_jobs import SECRET, Job
from heteromesh.errors import UserError
from heteromesh.faults.wire.bounds import Bounds
from heteromesh.runtime.process.environment import environment_of
from heteromesh.runtime.training.elastic import JOINED
from trainers import make_trainer

SUPPORT = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3] / "examples")]
SCRIPT = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from trainers import make_trainer

def losses(name, **changes):
    report = make_trainer(Path(sys.argv[1]) / name, **{"max_steps": 3, "print_plans": 0, **changes}).fit()
    # a file a rank: lines of two processes may run into each other
    with open(sys.argv[1] + os.environ["RANK"], "a") as file:
        print(name, *report.losses, file=file)

losses("first")
losses("second", shard_optimizer=True)
losses("first", max_steps=5, resume=True)
dist.init_process_group("gloo")
losses("third")
losses("fourth")
dist.destroy_process_group()
"""


def test_on_two_ranks_by_themselves_and_in_a_group_of_the_user(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([*SUPPORT, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "heteromesh", "run", "--nproc-per-node", "2", str(script), str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [line.split() for rank in "01" for line in (tmp_path / f"two{rank}").read_text().splitlines()]
    alone = make_trainer(tmp_path / "one", max_steps=5).fit().losses
    assert sorted(line[0] for line in told) == ["first"] * 4 + ["fourth"] * 2 + ["second"] * 2 + ["third"] * 2
    for _, *words in told:
        losses = [float(word) for word in words]
        assert losses == pytest.approx(alone[3:] if len(losses) == 2 else alone[:3], abs=1e-3)


def test_a_second_one_of_a_member_of_a_fault_tolerant_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job(tmp_path) as job:
        environment = environment_of(
            coordinators=[job.coordinator.address], secret=SECRET, name="host:0", hosts=["127.0.0.1"], bounds=Bounds()
        )
        for name, value in {**environment, JOINED: ""}.items():
            monkeypatch.setenv(name, value)
        make_trainer(tmp_path / "first", max_steps=2, fault_tolerance=True).fit()
        with pytest.raises(UserError, match=r"a second fit\(\) with fault_tolerance=True in one process"):
            make_trainer(tmp_path / "second", max_steps=2, fault_tolerance=True).fit()
    assert not (tmp_path / "second").exists()
