"""`heteromesh probe` as a user types it, on processes of this machine; and the same measurements without a launcher."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from virtual_link import LATENCY, virtual_link

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.cluster.links import Links, cluster_links
from heteromesh.planner.cost.measured import measured_costs
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.runtime.cli.main import main as heteromesh
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.engine.calibrate import Calibration
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.engine.known import known_costs
from heteromesh.runtime.launch import run
from heteromesh.runtime.network import measure as network
from heteromesh.runtime.network import pairs, sockets
from heteromesh.runtime.network.interfaces import Interface
from heteromesh.runtime.network.measure import Network, measure_links, measure_network
from heteromesh.runtime.network.sockets import CardRate, measure_cards
from heteromesh.runtime.probe import worker
from heteromesh.runtime.probe.assemble import with_costs
from heteromesh.runtime.probe.cli import main
from heteromesh.runtime.probe.devices import compute
from heteromesh.runtime.probe.model import costs
from heteromesh.runtime.probe.model.costs import measure_model
from heteromesh.runtime.probe.model.decoder import Decoder
from heteromesh.runtime.training.build import build_costs
from heteromesh.runtime.work.reader import Reader
from ranks import World, run_ranks

MODEL = "num_hidden_layers = 1\nhidden_size = 32\nnum_attention_heads = 4\nintermediate_size = 48\nvocab_size = 61\n"
SPEC = ModelSpec(name="m", layers=1, hidden=32, heads=4, kv_heads=4, head_dim=8, intermediate=48, vocab=61)


def probe(*words: object, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "heteromesh", "probe", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def refused(*words: object) -> str:
    """The sentence of a mistake that is found before any process starts."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in words])
    return str(caught.value)


def test_what_a_launcher_starts_is_measured_and_written(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    result = probe("-o", file, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    (rank,) = report["ranks"]
    assert rank["tflops"]["fp32"] > 0
    assert rank["memory_gbps"] > 0
    assert 0.1 < rank["busy_cores"] < (os.cpu_count() or 1) + 0.5
    cluster = load_cluster(file)
    assert (cluster.ranks, cluster.measured.speeds, measured_costs(cluster)) == (1, (1.0,), None)
    assert list(tmp_path.iterdir()) == [file]


def in_short(world: World, *words: str) -> tuple[str, str]:
    """What a rank of a probe prints and the sentence it refuses with; trials and sequences are short."""
    compute.SECONDS, compute.FIRST_SECONDS = 0.03, 0.01
    with (
        patch.object(costs, "LONGEST", 512),
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()),
    ):
        try:
            worker.main(words)
        except UserError as error:
            return out.getvalue(), str(error)
    return out.getvalue(), ""


def test_a_measured_model_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tmp_path / "small.toml", tmp_path / "c.toml"
    model.write_text(MODEL)
    (first, _), (second, _) = run_ranks(2, in_short, "-o", str(file), "--model", str(model), "--json")
    assert second == ""
    report, cluster = json.loads(first), load_cluster(file)
    (pair,) = report["network"]["local"]
    assert (pair["ranks"], pair["both"] > 0, pair["latency"] > 0) == ([0, 1], True, True)
    assert cluster.measured.link_gbps[0] == pytest.approx(pair["both"] / 1e9, rel=0.01)
    assert report["timed"]["tokens"] == 512
    costs = measured_costs(cluster)
    assert costs is not None
    assert costs.seconds_per_token > 0 or costs.seconds_per_token2 > 0
    words = ["plan", "--cluster", str(file), "--model", str(model), "--lengths", "lognormal:4,1,500"]
    assert heteromesh([*words, "--batch-sequences", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["cost_source"] == "measured"


def test_torchruns_flags_go_to_the_launcher_and_ours_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(words: list[str]) -> int:
        started.append(words)
        return 7

    monkeypatch.setattr(run, "main", start)
    words = "--nnodes=4 --node-rank 2 -o c.toml --model gpt-7b --force --rdzv-endpoint a:29500"
    assert main(words.split()) == 7
    flags = "--nnodes=4 --node-rank 2 --rdzv-endpoint a:29500 -m heteromesh.runtime.probe.worker"
    assert started == [f"{flags} -o c.toml --model gpt-7b --force".split()]


def test_bad_input_is_told_in_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    there = tmp_path / "there.toml"
    there.write_text("mine")
    assert "--force to replace it" in refused("-o", there)
    assert there.read_text() == "mine"
    assert "create" in refused("-o", tmp_path / "none/c.toml")
    assert "is a directory" in refused("-o", tmp_path)
    out = tmp_path / "c.toml"
    assert "'gpt-8b' is not built in" in refused("-o", out, "--model", "gpt-8b")
    assert "old.toml does not exist" in refused("-o", out, "--cluster", tmp_path / "old.toml")
    assert "probe starts no script" in refused("-o", out, "train.py")
    assert "unrecognized arguments: --plan" in refused("-o", out, "--plan=x")
    assert "required: -o" in refused("--nproc-per-node", "2")
    assert not out.exists()


def test_a_file_for_other_hosts_is_refused_by_the_ranks(tmp_path: Path) -> None:
    old, out = tmp_path / "old.toml", tmp_path / "c.toml"
    old.write_text('[[hosts]]\nnames = ["a"]\ndevice = "cpu"\ncount = 3\n')
    for printed, sentence in run_ranks(2, in_short, "-o", str(out), "--cluster", str(old)):
        assert printed == ""
        assert "start one process per device of the file" in sentence
    assert not out.exists()


def test_an_interrupted_probe_leaves_nothing(tmp_path: Path) -> None:
    words = ["-m", "heteromesh", "probe", "--nproc-per-node", "2", "-o", str(tmp_path / "c.toml")]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1.5)  # until they measure
    process.send_signal(signal.SIGINT)
    assert process.wait(150) == 130
    assert list(tmp_path.iterdir()) == []


def test_help_names_torchruns_flags_and_ours_and_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for flag in ("--nproc-per-node", "--rdzv-endpoint", "--output", "--model", "--cluster", "--force", "--json"):
        assert flag in text
    assert "training_script" not in text


def network_of(world: World, hosts: tuple[tuple[int, ...], ...]) -> Network:
    """Rank 3 sends at a quarter of the others' rate."""
    with virtual_link(world, 2e7 if world.rank < 3 else 5e6, (network, pairs)):
        return measure_network(world, hosts)


FOUR = ((0,), (1,), (2,), (3,))


def test_links_of_four_hosts_have_the_rates_that_were_set() -> None:
    found = run_ranks(4, network_of, FOUR)
    assert all(other == found[0] for other in found)
    one = found[0]
    assert [p.hosts for p in one.between] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for p in one.between:
        slower = 5e6 if 3 in p.hosts else 2e7
        assert (p.forward, p.backward, p.both) == pytest.approx((2e7, slower, slower))
        assert p.line.r2 == pytest.approx(1)
        assert p.latency == pytest.approx(LATENCY, rel=0.01)
    assert one.out == pytest.approx((2e7, 2e7, 2e7, 5e6), rel=0.01)
    # what three others send at once arrives at once
    assert one.into == pytest.approx((4.5e7, 4.5e7, 4.5e7, 6e7), rel=0.01)
    assert one.together == pytest.approx(1)


def held_up_network(world: World) -> tuple[Network, int]:
    with virtual_link(world, 2e7 if world.rank < 3 else 5e6, (network, pairs), hiccups=1) as clock:
        return measure_network(world, FOUR), clock.held_up


def test_messages_that_are_held_up_now_and_then_do_not_change_the_rates() -> None:
    found = run_ranks(4, held_up_network)
    assert all(count > 5 for _, count in found)
    one = found[0][0]
    assert one.out == pytest.approx((2e7, 2e7, 2e7, 5e6), rel=0.01)
    assert min(one.into) > 0.99 * 2e7


def test_two_ranks_of_a_host_share_its_link_to_another() -> None:
    found = run_ranks(3, network_of, ((0, 1), (2,)))[0]
    assert [p.ranks for p in found.local] == [(0, 1)]
    assert found.local[0].both == pytest.approx(2e7)
    assert len(found.between) == 1


def quick_links(world: World, hosts: tuple[int, ...]) -> Links:
    with virtual_link(world, 2e7 if world.rank < 3 else 5e6, (network, pairs)):
        return measure_links(world, hosts)


@pytest.mark.parametrize(
    ("hosts", "inside", "cards"),
    [
        ((0, 1, 2, 3), [2e7] * 4, [2e7, 2e7, 2e7, 5e6]),
        ((0, 0, 1, 1), [2e7, 5e6], [2.5e7, 2.5e7]),
        ((0, 1, 0, 2), [2e7] * 3, [2e7, 2e7, 5e6]),
        ((0, 0, 0, 1), [2e7, 5e6], [5e6, 5e6]),
    ],
)
def test_quick_rates_are_those_inside_hosts_and_of_their_cards(
    hosts: tuple[int, ...], inside: list[float], cards: list[float]
) -> None:
    found = run_ranks(4, quick_links, hosts)
    assert all(links == found[0] for links in found)
    assert found[0].hosts == hosts
    assert found[0].link == pytest.approx(inside, rel=0.01)
    assert found[0].ethernet == found[0].fabric_nics == pytest.approx(cards, rel=0.01)


def cards_of(world: World) -> list[CardRate]:
    names = [(h, f"e{n}", f"127.0.{n}.{h + 1}") for h in range(2) for n in range(2)]
    cards = [
        [Interface(name=name, address=address, prefix=24, mbit=None) for at, name, address in names if at == h]
        for h in range(2)
    ]
    sockets.SECONDS = 0.1
    return measure_cards(world, ((0,), (1,)), cards)


def test_cards_are_measured_each_by_its_own_address() -> None:
    rows = run_ranks(2, cards_of)
    assert rows[0] == rows[1]
    assert [(c.host, c.interface) for c in rows[0]] == [(0, "e0"), (0, "e1"), (1, "e0"), (1, "e1")]
    assert all(c.out > 1e6 and c.into > 1e6 for c in rows[0])


def costs_used(world: World, folder: str) -> list[bool]:
    """Whether the Trainer takes the file's costs for its model, whether for another; and the file's links then."""
    base = load_cluster(Path(folder) / "base.toml")
    cluster = with_costs(base, measure_model(world, SPEC, {"fp32": 1e-3}, cluster_links(base), 1.0))
    config = TrainerConfig(batch_tokens=100, max_steps=1, run_dir="unused")
    answers = []
    for layers in (1, 2):
        executor = StepExecutor(Decoder(SPEC, layers), world)
        reader = Reader([torch.arange(50) % 61] * 3)
        shape = Calibration(executor, reader.sample_input, 50).attention_shape()
        known = known_costs(cluster, executor, shape, None)
        costs = build_costs(config, cluster, executor, reader)
        answers += [known is not None, costs == measured_costs(cluster)]
        executor.close()
    return [*answers, costs.rate((0, 1)) == 1.5e9]


def test_the_trainer_takes_measured_costs_for_the_same_model_only(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        '[[hosts]]\nnames = ["a"]\ndevice = "cpu"\ncount = 2\n[measured]\nlink_gbps = [1.5]\n'
    )
    for answers in run_ranks(2, costs_used, str(tmp_path)):
        assert answers == [True, True, False, False, True]
