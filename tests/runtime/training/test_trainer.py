"""Trainer on 1 to 4 ranks: same losses whatever the world size, resume elsewhere, run directory, bad input."""

import json
import math
import os
import resource
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import heteromesh as hm
from heteromesh.errors import UserError
from heteromesh.planner.plan import step_from_json
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA, make_trainer


def train(world: World, folder: Path, changes: dict[str, Any]) -> tuple[float, ...]:
    return make_trainer(folder, **changes).fit().losses


def train_and_error(world: World, folder: Path, changes: dict[str, Any]) -> str:
    try:
        train(world, folder, changes)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[float, ...]]:
    """A run of 20 steps on four ranks, interrupted by nothing."""
    folder = tmp_path_factory.mktemp("four") / "run"
    losses = run_ranks(4, train, folder, {"checkpoint_every": 10})
    assert all(row == losses[0] for row in losses), "every rank reports the same losses"
    return folder, losses[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_are_those_of_four_ranks(ranks: int, four: tuple[Path, tuple[float, ...]], tmp_path: Path) -> None:
    losses = run_ranks(ranks, train, tmp_path / "run", {})[0]
    assert len(losses) == 20
    assert losses == pytest.approx(four[1], abs=1e-3)
    assert losses[-1] < losses[0] - 0.1, "it learns"


def test_resume_on_three_ranks_continues_the_curve_of_four(
    four: tuple[Path, tuple[float, ...]], tmp_path: Path
) -> None:
    run_ranks(4, train, tmp_path / "run", {"max_steps": 11})
    rest = run_ranks(3, train, tmp_path / "run", {"resume": True})[0]
    assert rest == pytest.approx(four[1][11:], abs=1e-3)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


def test_resume_repeats_the_steps_after_the_checkpoint(four: tuple[Path, tuple[float, ...]], tmp_path: Path) -> None:
    run_ranks(2, train, tmp_path / "run", {"max_steps": 8, "checkpoint_every": 5})
    os.rename(tmp_path / "run/checkpoints/step-00000008", tmp_path / "run/checkpoints/step-00000008.part")
    rest = run_ranks(2, train, tmp_path / "run", {"resume": True})[0]
    assert rest == pytest.approx(four[1][5:], abs=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert not list((tmp_path / "run/checkpoints").glob("*.part")), "the half-written checkpoint is gone"


def test_run_directory(four: tuple[Path, tuple[float, ...]]) -> None:
    folder, losses = four
    config = json.loads((folder / "config.json").read_text())
    assert config["ranks"] == 4
    constants = config["costs"]["constants"]
    assert constants["seconds_per_token"] + constants["seconds_per_token2"] > 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in metrics] == list(losses)
    for line in (folder / "plan.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = step_from_json(row["plan"])
        assert sorted(i for p in step.passes for i in p.sequences) == list(range(len(step.batch)))
        assert len(row["measured"]["busy_seconds"]) == 4
        assert {(m["position"], m["rank"]) for m in row["measured"]["passes"]} == {
            (i, r) for i, p in enumerate(step.passes) for r in p.ranks
        }
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
    assert not list(folder.rglob("*.part"))


def test_trace_has_a_span_for_everything(four: tuple[Path, tuple[float, ...]]) -> None:
    trace = json.loads((four[0] / "trace.json").read_text())["traceEvents"]
    spans = [e for e in trace if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == {0, 1, 2, 3}
    for rank in range(4):
        mine = [e for e in spans if e["pid"] == rank]
        assert {"comm", "optimizer", "wait", "checkpoint"} <= {e["cat"] for e in mine}
        assert {e["args"]["step"] for e in mine if e["cat"] == "optimizer"} == set(range(1, 21))
        assert {e["args"]["step"] for e in mine if e["name"] == "gradient sum 0"} == set(range(1, 21))
    plans = [json.loads(line) for line in (four[0] / "plan.jsonl").read_text().splitlines()]
    planned = sum(len(p["ranks"]) for row in plans for p in row["plan"]["passes"])
    assert len([e for e in spans if e["cat"] == "pass"]) == planned, "one span for every pass and rank"
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in spans)


def test_a_sharded_optimizer_continues_a_plain_one_and_the_other_way_round(
    four: tuple[Path, tuple[float, ...]], tmp_path: Path
) -> None:
    losses: tuple[float, ...] = ()
    for ranks, sharded, until in ((4, True, 7), (3, False, 11), (3, True, 15), (2, True, 20)):
        changes = {"max_steps": until, "resume": bool(losses), "shard_optimizer": sharded}
        losses += run_ranks(ranks, train, tmp_path / "run", changes)[0]
    assert losses == pytest.approx(four[1], abs=1e-3)
    trace = json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]
    gathered = {(e["pid"], e["args"]["step"]) for e in trace if e["name"] == "parameter gather 0"}
    assert gathered >= {(rank, step) for rank in (0, 1) for step in range(17, 21)}, "one a step, in the step after"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["exposed_comm_seconds"] < row["measured_seconds"] for row in rows)


def test_compressed_gradients_train(four: tuple[Path, tuple[float, ...]], tmp_path: Path) -> None:
    changes = {"gradient_compression": "int8", "shard_optimizer": True}
    losses = run_ranks(3, train, tmp_path / "run", changes)[0]
    assert losses == pytest.approx(four[1], abs=0.06)
    assert losses != pytest.approx(four[1], abs=1e-6), "they were compressed"
    assert json.loads((tmp_path / "run/config.json").read_text())["gradient_compression"] == "int8"


def write_cluster(folder: Path, gigabytes: float = 4, gbit: float = 1) -> Path:
    """Two hosts of one device."""
    (folder / "cluster.toml").write_text(
        f"[devices.small]\ntflops = 1\nmemory_gb = {gigabytes}\nmemory_gbps = 10\nlink_gbps = 1\n"
        f'[[hosts]]\nnames = ["a", "b"]\ndevice = "small"\ncount = 1\nnics = [{{ kind = "ethernet", gbit = {gbit} }}]\n'
    )
    return folder / "cluster.toml"


def test_state_that_fits_nowhere_is_told(tmp_path: Path) -> None:
    changes = {"shard_optimizer": True, "cluster": write_cluster(tmp_path, gigabytes=0.0003), "max_steps": 2}
    messages = run_ranks(2, train_and_error, tmp_path / "run", changes)
    assert all("does not fit on these ranks even with sharded weights" in m for m in messages), messages
    changes |= {"shard_weights": False, "offload_optimizer": "none"}
    messages = run_ranks(2, train_and_error, tmp_path / "whole", changes)
    assert all("the ranks have memory for 0" in m for m in messages), messages


@pytest.mark.parametrize(("gbit", "chosen"), [(100, "none"), (1e-5, "int8")])
def test_compression_is_chosen_where_links_are_slow(gbit: float, chosen: str, tmp_path: Path) -> None:
    changes = {"gradient_compression": "auto", "cluster": write_cluster(tmp_path, gbit=gbit), "max_steps": 2}
    changes["idle_hosts"] = False
    run_ranks(2, train, tmp_path / "run", changes)
    assert json.loads((tmp_path / "run/config.json").read_text())["gradient_compression"] == chosen


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    run_ranks(1, train, tmp_path / "run", {"max_steps": 5, "checkpoint_every": 1, "keep_checkpoints": 3})
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_and_checkpointing_train(precision: str, tmp_path: Path) -> None:
    changes = {"precision": precision, "checkpoint_activations": True, "max_steps": 6}
    changes["shard_optimizer"] = precision == "bf16"
    plain = run_ranks(2, train, tmp_path / "a", {"max_steps": 6})[0]
    assert run_ranks(2, train, tmp_path / "b", changes)[0] == pytest.approx(
        plain, abs=0.05 if precision == "bf16" else 1e-4
    )


class Poisoned(torch.nn.Module):
    """A model whose loss is NaN on one token."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.llama, self.token = Llama(TINY), token

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits = self.llama(input_ids, position_ids)
        return logits.masked_fill((input_ids == self.token).unsqueeze(-1), math.nan)


def poisoned_run(world: World, folder: Path, sharded: bool) -> str:
    data = [torch.tensor([1 + x % 50 for x in s]) for s in DATA]
    batches = Sampler([len(s) for s in DATA], batch_tokens=500, seed=0)
    poisoned = [batches.next_batch() for _ in range(3)][2].sequences[0]
    data[poisoned][1] = 60
    trainer = make_trainer(folder, Poisoned(60), data, checkpoint_every=1, batch_tokens=500, shard_optimizer=sharded)
    try:
        trainer.fit()
    except UserError as error:
        return str(error).replace(f"sequence {poisoned} of the data", "sequence POISONED of the data")
    return ""


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (3, False), (2, True)])
def test_a_loss_that_is_not_finite_names_step_rank_and_sequence(ranks: int, sharded: bool, tmp_path: Path) -> None:
    messages = run_ranks(ranks, poisoned_run, tmp_path / "run", sharded)
    assert len(set(messages)) == 1
    assert "the loss is nan at step 3: rank " in messages[0]
    assert "sequence POISONED of the data" in messages[0]
    assert "the last good checkpoint is step-00000002" in messages[0]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"], "the trace is there all the same"


def other_model(world: World, folder: Path) -> str:
    try:
        make_trainer(folder, Spare(), resume=True).fit()
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_ranks(1, train, folder, {"max_steps": 2})
    return folder


def test_a_checkpoint_of_another_model_is_refused(finished: Path) -> None:
    message = run_ranks(1, other_model, finished)[0]
    assert "is of another model" in message
    assert "another run directory" in message


def test_a_run_directory_in_use_is_refused(finished: Path) -> None:
    assert "already holds a run" in run_ranks(1, train_and_error, finished, {})[0]


def test_nothing_to_resume_is_refused(tmp_path: Path) -> None:
    assert "holds no run to resume" in run_ranks(1, train_and_error, tmp_path / "none", {"resume": True})[0]


def test_another_batch_size_on_resume_is_refused(finished: Path) -> None:
    message = run_ranks(1, train_and_error, finished, {"resume": True, "batch_tokens": 300})[0]
    assert "batch size" in message


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    run_ranks(2, train, tmp_path / "run", {"max_steps": 2})
    shards = sorted((tmp_path / "run/checkpoints/step-00000002").glob("*.distcp"))
    shards[0].unlink()
    messages = run_ranks(2, train_and_error, tmp_path / "run", {"resume": True, "max_steps": 4})
    assert all(f"step-00000002 is damaged ({shards[0].name} can't be read" in m for m in messages)
    (tmp_path / "run/checkpoints/step-00000002/meta.json").write_text("{")
    messages = run_ranks(2, train_and_error, tmp_path / "run", {"resume": True, "max_steps": 4})
    assert all("is damaged (meta.json is missing or damaged)" in m for m in messages)


def test_an_unwritable_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    messages = run_ranks(2, train_and_error, tmp_path / "file/run", {})
    assert all("can't be written" in m and "choose another directory" in m for m in messages)


def full_disk(world: World, folder: Path) -> str:
    """Files can't grow beyond what the metrics need: the checkpoint's shards hit the limit as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    return train_and_error(world, folder, {"max_steps": 3})


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    message = run_ranks(1, full_disk, tmp_path / "run")[0]
    assert "the checkpoint of step 3 can't be written" in message
    assert "there is none before it" in message
    # the limit's own words, or what torch's archive writer makes of a short write
    assert "File too large" in message or "the disk took fewer bytes than it was given, as a full one does" in message
    assert "free disk space or mend the directory and resume" in message
    assert "unexpected pos" not in message
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


class Deleting(hm.Hook):
    """Deletes the run directory when there is a step left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def step_committed(self, step: hm.StepCommitted) -> None:
        if step.metrics.step == 2 and step.world.writes:
            shutil.rmtree(self._folder)


def delete_meanwhile(world: World, folder: Path) -> str:
    trainer = make_trainer(folder, max_steps=3)
    trainer.hooks = (Deleting(folder),)
    try:
        trainer.fit()
    except UserError as error:
        return str(error)
    return ""


def test_a_run_directory_that_is_deleted_meanwhile_is_told(tmp_path: Path) -> None:
    for message in run_ranks(2, delete_meanwhile, tmp_path / "run"):
        assert "can't be written" in message
        assert "it is not there any more" in message or "No such file or directory" in message
        assert "\n" not in message
    assert not (tmp_path / "run/finished.json").exists()


def stop_on_second_rank(world: World, folder: Path) -> tuple[Any, int]:
    """SIGTERM reaches one rank only, in the middle of a step."""
    trainer = make_trainer(folder, max_steps=10_000)
    original = trainer.reader.step_inputs
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    trainer.reader.step_inputs = counted  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        trainer.fit()
    return ended.value.code, len(list((folder / "checkpoints").iterdir()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_on_one_rank_saves_and_stops_all(ranks: int, tmp_path: Path) -> None:
    results = run_ranks(ranks, stop_on_second_rank, tmp_path / "run")
    assert results == [(128 + signal.SIGTERM, 1)] * ranks
    done = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 10
    assert (tmp_path / f"run/checkpoints/step-{done:08d}/meta.json").exists()
    assert json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"gradient_compression": "fp4"}, "gradient_compression is 'fp4'"),
        ({"tokens_per_device": 0}, "tokens_per_device is 0"),
    ],
)
def test_senseless_settings_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        hm.TrainerConfig(**({"batch_tokens": 10, "max_steps": 1, "run_dir": "x"} | change))


def test_a_sequence_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    messages = run_ranks(2, train_and_error, tmp_path / "run", {"tokens_per_device": 30})
    assert all("60" in m and "tokens" in m for m in messages), messages


def labelled_run(world: World, folder: Path) -> tuple[float, ...]:
    """Half of each sequence is a prompt without loss."""
    data = [{"input_ids": s, "labels": [-100] * (len(s) // 2) + [*s[len(s) // 2 + 1 :], -100]} for s in DATA]
    return make_trainer(folder, None, data, max_steps=3).fit().losses


def test_labels_and_ignored_tokens(tmp_path: Path) -> None:
    one, two = (run_ranks(n, labelled_run, tmp_path / str(n))[0] for n in (1, 2))
    assert one == pytest.approx(two, abs=1e-5)
    plain = run_ranks(1, train, tmp_path / "plain", {"max_steps": 3})[0]
    assert one != pytest.approx(plain, abs=1e-5), "the prompts are left out"


class Spare(torch.nn.Module):
    """A model with a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.llama, self.spare = Llama(TINY), torch.nn.Parameter(torch.ones(3))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.llama(input_ids, position_ids)
        return logits


def spare_run(world: World, folder: Path, steps: int, resume: bool) -> tuple[tuple[float, ...], list[float]]:
    """AdamW with decay and a schedule; the spare parameter must stay what it is."""
    torch.manual_seed(2)
    model = Spare()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    config = hm.TrainerConfig(batch_tokens=220, max_steps=steps, run_dir=folder, resume=resume)
    data = [torch.tensor(s) for s in DATA]
    report = hm.Trainer(model, optimizer, data, config, schedule=schedule).fit()
    assert report.summary()
    return report.losses, model.spare.tolist()


def test_a_parameter_without_gradient_and_a_schedule_survive_a_resume(tmp_path: Path) -> None:
    whole, spare = run_ranks(1, spare_run, tmp_path / "whole", 8, False)[0]
    assert spare == [1.0, 1.0, 1.0]
    first, spare = run_ranks(2, spare_run, tmp_path / "parts", 5, False)[0]
    assert spare == [1.0, 1.0, 1.0], "weight decay leaves it alone on several ranks too"
    rest, spare = run_ranks(1, spare_run, tmp_path / "parts", 8, True)[0]
    assert spare == [1.0, 1.0, 1.0]
    assert (*first, *rest) == pytest.approx(whole, abs=1e-3)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.5e-2 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    nothing, _ = run_ranks(1, spare_run, tmp_path / "parts", 8, True)[0]
    assert nothing == (), "no step was left to do"


def other_data_on_one_rank(world: World, folder: Path) -> str:
    data = [torch.tensor(s) for s in DATA]
    if world.rank == 1:
        data[7] = data[7][:-1]
    try:
        make_trainer(folder, None, data).fit()
    except UserError as error:
        return str(error)
    return ""


def test_ranks_with_other_data_are_refused(tmp_path: Path) -> None:
    messages = run_ranks(2, other_data_on_one_rank, tmp_path / "run")
    assert all("rank 1 has the data 60 sequences" in m for m in messages)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ([0.5, 1.5], "float"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3]}, "3 input_ids and 2 labels"),
    ],
)
def test_sequences_that_are_no_rows_of_ids_are_refused(item: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path / "run", None, [item, [1, 2]], max_steps=1).fit()


def test_too_long_a_path_is_told(tmp_path: Path) -> None:
    assert "can't be written" in run_ranks(1, train_and_error, tmp_path / ("x" * 300), {})[0]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is an extra and is not installed")
def test_tensorboard_files_are_written(four: tuple[Path, tuple[float, ...]]) -> None:
    assert list((four[0] / "tensorboard").glob("events.*"))
