import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Measured, load_cluster, local_cluster
from heteromesh.planner.cost.analytic import analytic_costs, model_attention
from heteromesh.planner.cost.json import costs_from_json, costs_to_json
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.model.attention import split_methods
from heteromesh.planner.model.constants import Constants, load_constants
from heteromesh.planner.model.spec import MODELS
from heteromesh.planner.ownership.memory import BUCKETS_BYTES
from heteromesh.planner.report.assemble import ANALYTIC, COST_FILE, MEASURED, build_problem
from heteromesh.planner.report.fixes import parse_fixes

EXAMPLES = Path(__file__).parents[3] / "examples"
GOOD = (EXAMPLES / "flexsp-7b-cost.toml").read_text()


def flexsp_cluster():
    return load_cluster(EXAMPLES / "clusters" / "flexsp-a100-64.toml")


def large_cluster():
    """Returns FlexSP's cluster with twice the memory: all weights fit a device."""
    cluster = flexsp_cluster()
    return replace(cluster, devices={name: replace(d, memory_gb=80) for name, d in cluster.devices.items()})


def mixed_cluster(**measured):
    hosts = (Host(name="a", device="A100-80GB", count=1), Host(name="b", device="V100-16GB", count=2))
    return Cluster(name="mixed", hosts=hosts, devices=CATALOG, measured=Measured(**measured))


def load(tmp_path, text):
    path = tmp_path / "cost.toml"
    path.write_text(text)
    return load_constants(path)


def test_flexsp_example_gives_flexsp_seconds():
    # 7B on 64 A100-40GB (research notes 1.3): milliseconds (a*s*s + b*s)/d + beta + 16*l*h*s/2^20/d/v
    costs = bind(load_constants(EXAMPLES / "flexsp-7b-cost.toml"), flexsp_cluster())
    length, degree, rate = 32_768, 8, 96.5
    compute = (5.128e-6 * length**2 + 183.9576e-3 * length) / degree + 629.36
    exchange = 16 * 32 * 4096 * length / 2**20 / degree / rate
    shards = [(length // degree,)] * degree
    seconds = costs.pass_seconds(range(degree), "ulysses", [length], shards)
    assert seconds == pytest.approx((compute + exchange) / 1e3, rel=1e-4)
    assert costs.capacity == (6407,) * 64
    assert costs.hosts[7:9] == (0, 1)


def test_bind_scales_speed_and_memory_with_the_device(tmp_path):
    costs = bind(load(tmp_path, GOOD), mixed_cluster())
    assert costs.speeds == (1.0, 125 / 312, 125 / 312)
    assert costs.capacity == (6407, 6407 * 16 // 80, 6407 * 16 // 80)
    measured = bind(load(tmp_path, GOOD), mixed_cluster(speeds=(1.0, 0.3, 0.2)))
    assert measured.speeds == (1.0, 0.3, 0.2)
    with pytest.raises(UserError, match="room for no token"):
        bind(replace(load(tmp_path, GOOD), tokens_per_device=4), mixed_cluster())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seconds_per_pass = ", "second_per_pass = ", "did you mean 'seconds_per_pass'"),
        (
            "seconds_per_token = 1.839576e-4",
            "seconds_per_token = -1e-4",
            "seconds_per_token is -0.0001: it must be zero or",
        ),
        ("seconds_per_token = 1.839576e-4", "seconds_per_token = nan", "seconds_per_token is nan"),
        ("tokens_per_device = 6407", "tokens_per_device = 6407.5", "tokens_per_device is 6407.5: it must be a whole"),
        ("tokens_per_device = 6407", "tokens_per_device = 0", "tokens_per_device is 0: it must be above zero"),
        ("tokens_per_device = 6407", "", "lacks the key 'tokens_per_device'"),
        ("2 = 1.2535e11", "two = 1.2535e11", "has the key 'two': it must be a whole number"),
        ("2 = 1.2535e11", "1 = 1.2535e11", "has the key 1: it must be a degree, 2 or more"),
        ("2 = 1.2535e11", "2 = 0", "bytes_per_second.2 is 0: it must be above zero"),
        ("2 = 1.2535e11", "2 = fast", "line 9 is not TOML"),
        ("[bytes_per_second] ", "[bytes_per_minute] ", "unknown key 'bytes_per_minute'"),
    ],
)
def test_bad_cost_files(tmp_path, old, new, words):
    assert old in GOOD
    with pytest.raises(UserError) as error:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert words in str(error.value)
    assert "cost.toml" in str(error.value)


def test_senseless_constants(tmp_path):
    free = GOOD.replace("5.128e-9", "0.0").replace("1.839576e-4", "0.0")
    with pytest.raises(UserError, match="are both 0"):
        load(tmp_path, free)
    with pytest.raises(UserError, match="is empty: give the rate"):
        load(tmp_path, GOOD.partition("[bytes_per_second]")[0])
    with pytest.raises(UserError, match="does not exist"):
        load_constants(tmp_path / "none.toml")


def test_order_of_preference():
    given = load_constants(EXAMPLES / "flexsp-7b-cost.toml")
    measured = replace(given, tokens_per_device=100)
    cluster = mixed_cluster(constants=measured)
    model, fixes = MODELS["gpt-7b"], parse_fixes([])
    assert build_problem(cluster, model, given, fixes).source == COST_FILE
    assert build_problem(cluster, model, given, fixes).costs.capacity[0] == 6407
    assert build_problem(cluster, model, None, fixes).source == MEASURED
    assert build_problem(cluster, model, None, fixes).costs.capacity[0] == 100
    assert build_problem(flexsp_cluster(), model, None, fixes).source == ANALYTIC
    with pytest.raises(UserError, match="checkpointing can't be used with cost file costs"):
        build_problem(cluster, model, given, parse_fixes(["checkpointing=on"]))


def test_analytic_compute_is_near_flexsp_profile():
    ours = analytic_costs(flexsp_cluster(), MODELS["gpt-7b"], capacity=(6407,) * 64)
    theirs = load_constants(EXAMPLES / "flexsp-7b-cost.toml")
    assert ours.seconds_per_token == pytest.approx(theirs.seconds_per_token, rel=0.15)
    assert ours.seconds_per_token2 == pytest.approx(theirs.seconds_per_token2, rel=0.15)
    ulysses = next(m for m in ours.methods if m.name == "ulysses")
    assert ulysses.bytes_per_token == theirs.bytes_per_token
    assert MODELS["gpt-7b"].activation_bytes_per_token() == pytest.approx(4.4804 * 2**20, rel=0.06)


def test_analytic_memory_is_what_the_states_leave():
    cluster, model = large_cluster(), MODELS["gpt-7b"]
    # the Trainer's: fp32 weights and gradients, Adam's moments sharded
    states = model.parameters() * 8 + model.parameters() * 8 / 64 + BUCKETS_BYTES
    room = (80e9 * 0.9 - states) / model.activation_bytes_per_token()
    assert analytic_costs(cluster, model).capacity == (int(room),) * 64


def test_checkpointing_trades_seconds_for_memory():
    cluster, model = large_cluster(), MODELS["gpt-7b"]
    plain, frugal = analytic_costs(cluster, model), analytic_costs(cluster, model, checkpointing=True)
    assert frugal.seconds_per_token == pytest.approx(plain.seconds_per_token * 4 / 3)
    assert frugal.seconds_per_token2 == pytest.approx(plain.seconds_per_token2 * 4 / 3)
    assert frugal.capacity[0] > 4 * plain.capacity[0]


def test_gather_moves_keys_and_values_only():
    few, many = (
        {m.name: m for m in split_methods(model_attention(MODELS[name]), (0, 0), 1e6)}
        for name in ("llama-3-8b", "gpt-7b")
    )
    assert few["gather"].bytes_per_token * 4 == many["gather"].bytes_per_token
    assert few["ulysses"].heads == 32
    assert few["gather"].heads == 0


def test_a_model_that_does_not_fit_says_how_much_is_missing():
    with pytest.raises(
        UserError, match=r"llama-3-70b does not fit on rank 0 \(A100-40GB\).* take 573\.3 GB and 36\.0 GB"
    ):
        analytic_costs(flexsp_cluster(), MODELS["llama-3-70b"])


@pytest.mark.parametrize("kind", ["table", "links", "fixed"])
def test_costs_survive_json_and_pickle(kind):
    cluster = flexsp_cluster()
    if kind == "links":
        traffic = StepTraffic(gather_seconds=0.5, reduce_seconds=1.5, chunks=32, layer_major=True)
        costs = analytic_costs(cluster, MODELS["gpt-7b"], capacity=(6407,) * 64, traffic=traffic)
    else:
        costs = bind(load_constants(EXAMPLES / "flexsp-7b-cost.toml"), cluster)
    if kind == "fixed":
        costs = parse_fixes(["max_degree=8"]).apply(costs)
    for again in (
        costs_from_json(json.loads(json.dumps(costs_to_json(costs))), "plan"),
        pickle.loads(pickle.dumps(costs)),
    ):
        assert again == costs
        assert [again.rate(range(d)) for d in (2, 16, 48)] == [costs.rate(range(d)) for d in (2, 16, 48)]
        assert [m.fits(16) for m in again.methods] == [kind != "fixed"] * len(costs.methods)


def test_costs_of_a_run_may_name_methods_only():
    data = {
        "constants": {"seconds_per_token": 1e-4, "bytes_per_token": 8, "bytes_per_second": {"2": 1e9}},
        "speeds": [1, 0.5],
        "capacity": [10, 20],
        "methods": ["gather"],
    }
    costs = costs_from_json(data, "config")
    assert costs.hosts == (0, 0)
    assert costs.methods[0].bytes_at(2) == 8
    with pytest.raises(UserError, match="config is not a cost model"):
        costs_from_json({**data, "speeds": "fast"}, "config")
    with pytest.raises(UserError, match="config is not a cost model"):
        costs_from_json({**data, "methods": [{"name": "x", "colour": 1}]}, "config")


def test_fixes():
    costs = analytic_costs(
        local_cluster(4), replace(MODELS["gpt-7b"], layers=2, hidden=64, heads=8, kv_heads=8, head_dim=8)
    )
    assert [m.name for m in parse_fixes(["method=gather"]).apply(costs).methods] == ["gather"]
    assert parse_fixes(["method=local"]).apply(costs).methods == ()
    capped = parse_fixes(["max-degree=2"]).apply(costs)
    assert {m.name for m in capped.methods if m.fits(2)} >= {"ulysses", "gather", "trimmed_ring"}
    assert not any(m.fits(3) for m in capped.methods)
    assert capped.method_for((0, 1, 2)) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["colour=3"], "names nothing that can be fixed: use NAME=VALUE with max_degree, method, max_length or check"),
        (["max_degree"], "use NAME=VALUE"),
        (["max_degree=0"], "must be a whole number, at least 1"),
        (["max_length=1e5"], "must be a whole number, at least 1"),
        (["checkpointing=maybe"], "must be on or off"),
        (["max_degree=2", "max-degree=3"], "given twice"),
    ],
)
def test_bad_fixes(words, message):
    with pytest.raises(UserError, match=message):
        parse_fixes(words)


def test_a_method_that_does_not_exist_cannot_be_fixed():
    costs = bind(load_constants(EXAMPLES / "flexsp-7b-cost.toml"), flexsp_cluster())
    with pytest.raises(UserError, match="method=ring is not a method of this cost model: use local or ulysses"):
        parse_fixes(["method=ring"]).apply(costs)


def test_constants_default_to_no_extra_cost():
    constants = Constants(
        seconds_per_token2=0.0, seconds_per_token=1.0, seconds_per_pass=0.0, bytes_per_token=0.0, tokens_per_device=10
    )
    costs = bind(constants, local_cluster(2))
    assert costs.pass_seconds((0, 1), "ulysses", [4], [(2,), (2,)]) == 2.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_losss_memory_never_waits_in_host_memory(checkpointing):
    model = MODELS["llama-3-8b"]
    costs = analytic_costs(large_cluster(), model, checkpointing=checkpointing, capacity=(100,) * 64)
    saved = model.activation_bytes_per_token(checkpointing=checkpointing)
    kept = saved * (1 - costs.offload_share)
    assert kept > model.loss_bytes
    layer = model.layer_input_bytes if checkpointing else model.layer_activation_bytes
    assert kept == pytest.approx(saved - (model.layers - 2) * layer)
