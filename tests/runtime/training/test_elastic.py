"""Training that goes on when members die and join: same losses, every sequence once, nothing missing in the files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from elastic_jobs import STEPS, Job, check_ledger, eventually, rows, through_losses_and_a_join
from heteromesh.comm.tcp.state_transfer import digest_of, pack, unpack
from heteromesh.errors import UserError
from llama import Llama
from steps import TINY
from trainers import DATA, make_trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, ...]:
    """The losses of one process that knows nothing of faults."""
    return make_trainer(tmp_path_factory.mktemp("alone") / "run", max_steps=STEPS).fit().losses


@pytest.mark.parametrize("tokens", [None, 60], ids=["whole sequences", "sequences that one device can't hold"])
def test_members_die_and_join_and_the_curve_stays(tokens: int | None, alone: tuple[float, ...], tmp_path: Path) -> None:
    (losses, digest), (late, same) = through_losses_and_a_join(tmp_path, tokens_per_device=tokens)
    assert losses == pytest.approx(alone, abs=1e-3)
    assert late == losses[-len(late) :], "the joiner goes on where the others are"
    assert digest == same, "the same bits on all members"
    ledger = check_ledger(tmp_path)
    if tokens:
        assert any("+" in members for row in ledger for members in row["trained"]), "some passes have several members"
    for name in ("metrics.jsonl", "plan.jsonl"):
        assert [row["step"] for row in rows(tmp_path / "run" / name)] == list(range(1, STEPS + 1))
    began = len(rows(tmp_path / "run/plan.jsonl")[0]["measured"]["members"])
    assert json.loads((tmp_path / "run/config.json").read_text())["ranks"] == began, "the first writer's"
    assert any(row["measured"]["repairs"] for row in rows(tmp_path / "run/plan.jsonl")), "lost work was planned again"
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    more = make_trainer(tmp_path / "run", max_steps=STEPS + 1, resume=True)
    assert len(more.fit().losses) == 1, "an ordinary run goes on from it"


def test_int8_and_a_cluster_file_through_losses_and_a_join(alone: tuple[float, ...], tmp_path: Path) -> None:
    hosts = [
        f'[[hosts]]\nnames = ["h{i}"]\ndevice = "cpu"\ncount = 1\n'
        f'nics = [{{ kind = "ethernet", gbit = {gbit}, count = 2 }}]\n'
        for i, gbit in enumerate((1, 2, 4))
    ]
    cluster = tmp_path / "cluster.toml"
    cluster.write_text("".join(hosts))
    changes: dict[str, Any] = {"cluster": cluster, "gradient_compression": "int8"}
    (losses, digest), (late, same) = through_losses_and_a_join(tmp_path, placed=True, **changes)
    assert losses == pytest.approx(alone, abs=0.06)
    assert losses != pytest.approx(alone, abs=1e-6), "gradients were compressed"
    assert late == losses[-len(late) :]
    assert digest == same, "the same bits on all members"
    check_ledger(tmp_path)
    places = {"host:0": 0, "host:1": 1, "host:2": 2, "host:3": 1}
    members = [row["measured"]["names"] for row in rows(tmp_path / "run/plan.jsonl")]
    assert all(names == sorted(names, key=places.__getitem__) for names in members), "as in the cluster file"
    assert ["host:3", "host:2"] in members, "not in the order of arrival"


def test_a_process_that_the_cluster_file_has_no_device_for_is_refused(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text('[[hosts]]\nnames = ["h"]\ndevice = "cpu"\ncount = 3\n')
    with Job(tmp_path) as job:
        job.start(0, place=3, cluster=cluster)
        assert "describes 3 ranks and this is rank 3 (counted from 0)" in job.result(0)
        job.start(1, cluster=cluster)
        assert "HETEROMESH_MEMBER_PLACE is not set" in job.result(1)


def test_a_member_alone_resumes_an_ordinary_run(alone: tuple[float, ...], tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=5).fit()
    with Job(tmp_path) as job:
        job.start(0, resume=True)
        losses, _ = job.result(0)
    assert losses == pytest.approx(alone[5:], abs=1e-3)
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == list(range(1, STEPS + 1))


def test_who_was_told_something_else_is_refused_by_name(tmp_path: Path) -> None:
    with Job(tmp_path, least=2) as job:
        job.start(0)
        eventually(lambda: job.coordinator.membership.people)
        job.start(1, learning_rate=0.5)
        told = job.result(1)
        assert told.startswith("UserError: this process does not belong to the job: ")
        assert "learning_rate is 0.5, the job's is 0.003" in told


def test_too_few_members_end_with_the_checkpoint_named(tmp_path: Path) -> None:
    with Job(tmp_path, least=2, patience=0.5) as job:
        job.start(0, checkpoint_every=2)
        job.start(1, dies_in=6, checkpoint_every=2)
        told = job.result(0) or job.result(1)
    assert told.startswith("JobOver: 1 members are left and the job needs 2: nobody joined within 0.5 s; ")
    assert told.endswith(
        f"start the run again with resume=True: it continues at {tmp_path}/run/checkpoints/step-00000004"
    )


def test_a_bad_run_directory_ends_all_members(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=1).fit()
    with Job(tmp_path) as job:
        job.start(0)
        job.start(1)
        for index in (0, 1):
            assert "already holds a run" in job.result(index)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"compare_batches": 2}, "compare_batches=2 don't go together"),
        ({"offload_optimizer": "disk"}, "offload_optimizer='disk' don't go together"),
        ({"gradient_compression": "auto"}, "gradient_compression='auto' don't go together"),
    ],
)
def test_settings_that_do_not_go_together(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=told):
        make_trainer(tmp_path / "run", fault_tolerance=True, **changes).fit()


def test_under_torchrun_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="heteromesh run --fault-tolerance"):
        make_trainer(tmp_path / "run", fault_tolerance=True).fit()


def test_a_process_that_nothing_launched_trains_as_without(alone: tuple[float, ...], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_steps=3, fault_tolerance=True)
    assert trainer.fit().losses == pytest.approx(alone[:3])


def test_a_schedule_that_can_not_travel_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = Llama(TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Odd(torch.optim.lr_scheduler.ConstantLR):
        def state_dict(self) -> dict[str, Any]:
            return {"folder": Path("x")}

    config = hm.TrainerConfig(batch_tokens=220, max_steps=1, run_dir=tmp_path / "run", fault_tolerance=True)
    trainer = hm.Trainer(model, optimizer, [torch.tensor(s) for s in DATA], config, schedule=Odd(optimizer))
    with pytest.raises(UserError, match=r"the schedule's \(Odd\) 'folder', a PosixPath, can't be saved"):
        trainer.fit()


def test_any_state_travels_and_its_digest_tells_it() -> None:
    shared = torch.randn(3, 4)
    state = {"a": shared.t(), "b": [shared, {"n": 3, "none": None}], "empty": torch.empty(0), "lr": 0.1}
    head, tensors = pack(state)
    copy, rooms = unpack(head)
    for tensor, room in zip(tensors, rooms, strict=True):
        room.copy_(tensor)
    assert torch.equal(copy["a"], state["a"])
    assert torch.equal(copy["b"][0], shared)
    assert copy["b"][1] == {"n": 3, "none": None}
    assert digest_of(copy) == digest_of(state)
    copy["b"][0][0, 0] += 1
    assert digest_of(copy) != digest_of(state)


def test_a_state_brings_no_code() -> None:
    head, _ = pack({"a": hashlib.blake2b})
    with pytest.raises(Exception, match="only plain values and tensors travel"):
        unpack(head)
