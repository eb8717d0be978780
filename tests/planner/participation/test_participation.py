"""Who takes part: against every subset, the clusters of the issue, what hosts add or cost, what does not fit."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.planner import plan as plans
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic, load_cluster
from heteromesh.planner.cost.json import costs_of_plan
from heteromesh.planner.model.spec import MODELS, ModelSpec
from heteromesh.planner.participation.effects import host_effects
from heteromesh.planner.participation.layout import REPLICATED, SHARDED_OPTIMIZER, Setting
from heteromesh.planner.participation.replicated import replicated, scatter_seconds
from heteromesh.planner.participation.search import all_subsets, decide, holds, plan_layout, step_tokens
from heteromesh.planner.participation.sharded import Part, sharded
from heteromesh.planner.participation.shortage import DoesNotFit, does_not_fit, replicated_short
from heteromesh.planner.participation.told import working_in
from heteromesh.planner.reduction.reduction import reduction_for
from heteromesh.planner.report.assemble import build_problem, make_plan, peak_activations
from heteromesh.planner.report.check import check_step
from heteromesh.planner.report.fixes import parse_fixes
from heteromesh.planner.report.ownership_text import ownership_sections
from heteromesh.planner.report.simulate import Disturbance, simulate_plan

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import participation as brute  # noqa: E402

SMALL = ModelSpec(
    name="1.1b", layers=22, hidden=2048, heads=32, kv_heads=4, head_dim=64, intermediate=5632, vocab=32_000
)
MOTLEY = load_cluster(ROOT / "examples/clusters/motley-40.toml")
SLOW = (Nic(kind="ethernet", gbit=10),)
FAST = (Nic(kind="infiniband", gbit=200, count=4), Nic(kind="ethernet", gbit=25))


def cluster(*hosts):
    return Cluster(name="test", hosts=hosts, devices={h.device: CATALOG[h.device] for h in hosts})


def a100(count, devices=8, **more):
    return [
        Host(name=f"a{i}", device="A100-80GB", count=devices, fabric="ib0", nics=FAST, **more) for i in range(count)
    ]


def lengths(count, seed=0):
    rng = random.Random(seed)
    return tuple(min(8192, int(rng.lognormvariate(7, 1)) + 1) for _ in range(count))


def test_slow_hosts_are_left_out_and_told_what_they_would_cost():
    slow = [Host(name=f"v{i}", device="V100-32GB", count=4, nics=SLOW) for i in range(2)]
    setting = Setting(cluster=cluster(*a100(2), *slow), model=SMALL, batch=lengths(128))
    decision = decide(setting, seconds=2.0, plan_seconds=0.05)
    layout = decision.best.layout
    assert layout.ranks == tuple(range(16))
    assert layout.holders == ()
    assert set(layout.fractions) == set(range(16)), "they hold nothing"
    assert layout.kind == SHARDED_OPTIMIZER
    effects = {e.what: e for e in host_effects(setting, decision, seconds=9.0, plan_seconds=0.05)}
    all_working, without = effects["all hosts working"], effects["without a0, a1"]
    # the gradients of 1.1 B parameters, 4 bytes each, once each way over 10 Gbit/s at 75 %
    assert all_working.seconds > 4 * SMALL.parameters() / (0.75 * 10e9 / 8)
    assert all_working.seconds > 4 * decision.best.seconds
    assert without.seconds > 2 * decision.best.seconds
    assert "with v0, v1 working" in effects or "all hosts working" in effects
    assert all_working.words.startswith("all hosts working: ")


def test_a_host_with_a_fast_nic_takes_part():
    peer = Host(name="v0", device="V100-32GB", count=8, fabric="ib0", nics=FAST)
    setting = Setting(cluster=cluster(*a100(1), peer), model=SMALL, batch=lengths(128))
    assert decide(setting, seconds=2.0, plan_seconds=0.05).best.layout.ranks == tuple(range(16))


def test_faster_nics_are_told_to_pay():
    slow = (Nic(kind="ethernet", gbit=25),)
    hosts = [Host(name=f"g{i}", device="A100-80GB", count=2, nics=slow) for i in range(3)]
    setting = Setting(cluster=cluster(*hosts), model=SMALL, batch=lengths(48))
    decision = decide(setting, seconds=2.0, plan_seconds=0.05)
    effects = host_effects(setting, decision, seconds=9.0, plan_seconds=0.05)
    faster = [e for e in effects if e.what == "25 -> 100 Gbit/s on g0-g2"]
    assert len(faster) == 1
    assert faster[0].seconds < 0.95 * decision.best.seconds


def test_choice_is_within_two_percent_of_the_best_subset():
    rng, checked = random.Random(5), 0
    while checked < 3:
        setting = brute.random_setting(rng)
        if setting.cluster.ranks > 5 or len(setting.batch) > 16:
            continue
        decision = decide(setting, seconds=30.0, plan_seconds=brute.PLAN_SECONDS)
        best = min(brute.best_seconds(setting, ranks) for ranks in brute.host_subsets(setting))
        if decision is None:
            assert best == float("inf")
            continue
        checked += 1
        assert decision.proved
        assert decision.best.seconds <= 1.02 * best
        assert decision.bound <= decision.best.seconds
        # both may be off by the gap at which the program of ownerships stops
        assert decision.bound <= best * 1.01


def test_subsets_count_alike_hosts_once():
    names = Setting(cluster=MOTLEY, model=SMALL, batch=(8192,))
    assert len(names.classes) == 4
    found = list(all_subsets(names))
    assert len(found) == len(set(found)) == 3 * 2 * 4 * 2 - 1
    many = [Host(name=f"h{i}", device=d, count=1, nics=SLOW) for d in ("T4", "L4", "A10-24GB") for i in range(40)]
    some = list(all_subsets(Setting(cluster=cluster(*many), model=SMALL, batch=(8192,))))
    assert len(some) < 200
    assert max(map(len, some)) == 120


def test_the_gradient_sum_is_priced_as_the_runtime_reduces():
    setting = Setting(cluster=MOTLEY, model=SMALL, batch=lengths(16))
    for ranks in (range(16), range(40)):
        reduction = reduction_for(MOTLEY.subset(tuple(ranks)))
        per_byte = reduction.ring_seconds_per_byte if reduction.ring else reduction.seconds_per_byte
        layout = replicated(setting, tuple(ranks))
        assert layout.kind == REPLICATED
        assert layout.traffic.reduce_seconds == pytest.approx(4 * SMALL.parameters() * per_byte)
        # what is scattered and gathered again one after the other takes at least what both take together
        assert 2 * scatter_seconds(setting, tuple(ranks), reduction) >= reduction.seconds_per_byte * (1 - 1e-9)


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt-7b", "qwen3-8b"])
def test_models_larger_than_the_smallest_device_are_planned(name):
    setting = Setting(cluster=MOTLEY, model=MODELS[name], batch=(8192,) * 32)
    decision = decide(setting, seconds=0.2, plan_seconds=0.02)
    layout, step = decision.best.layout, decision.best.step
    check_step(step, decision.best.costs)
    assert set(layout.memory) == set(layout.ranks + layout.holders)
    tokens, peaks = step_tokens(step, layout.ranks), peak_activations([step], decision.best.costs)
    for number, rank in enumerate(layout.ranks):
        held = layout.tokens.added(layout.memory[rank], of_pass=peaks[number], of_step=tokens[rank])
        assert held.total <= 1e9 * MOTLEY.device_of(rank).memory_gb
        assert held.context == pytest.approx(0.1e9 * MOTLEY.device_of(rank).memory_gb)
    assert sum(layout.fractions.values()) == pytest.approx(1)
    assert replicated_short(setting), "weights and gradients are whole on no RTX-4090"


@pytest.mark.parametrize(
    ("name", "device", "gbit"), [("llama-3-70b", "H100-80GB", 400), ("mixtral-8x7b", "A100-80GB", 200)]
)
def test_models_that_people_train_on_64_devices_fit(name, device, gbit):
    nics = (Nic(kind="infiniband", gbit=gbit, count=8),)
    hosts = [Host(name=f"h{i}", device=device, count=8, fabric="ib0", nics=nics) for i in range(8)]
    setting = Setting(cluster=cluster(*hosts), model=MODELS[name], batch=(8192,) * 64)
    layout = sharded(setting, Part(tuple(range(64))), 4.0)
    assert layout is not None
    planned = plan_layout(setting, layout, setting.batch, 0.02)
    assert planned is not None
    assert holds(setting, layout, planned.step)
    # a model of this size is whole on no device
    assert all(m.weights < 0.5 * 2 * setting.model.parameters() for m in layout.memory.values())


def test_a_plan_file_has_all_that_explain_and_simulate_need(tmp_path):
    slow = Host(name="t0", device="T4", count=2, nics=SLOW)
    problem = build_problem(cluster(slow, *a100(1, devices=2)), SMALL, None, parse_fixes([]))
    plan = make_plan(problem, [lengths(24), lengths(24, seed=1)], time_limit=0.02)
    assert plan.layout["ownership"]["working"] == [2, 3]
    assert {r for s in plan.steps for p in s.passes for r in p.ranks} == {2, 3}
    plans.dump(plan, tmp_path / "plan.json")
    again = plans.load(tmp_path / "plan.json")
    assert json.dumps(plans.to_json(again)) == json.dumps(plans.to_json(plan))
    costs = costs_of_plan(again, "plan")
    for step in again.steps:
        check_step(step, costs)
    runs = simulate_plan(again.steps, costs, Disturbance(slow={2: 2.0}, fail=None))
    assert runs[0].seconds > again.steps[0].seconds
    text = "\n".join(ownership_sections(again))
    assert "2 of 4 ranks work (2-3), 0-1 stay out" in text
    assert "not executed by the Trainer yet: idle ranks (rank 0 plans and writes" in text
    assert working_in(again) is None  # rank 0 is one of the idle
    assert "shard_optimizer=True" in text
    assert "with t0 working" in text or "all hosts working" in text
    for where, table in (
        ("ownership", again.layout["ownership"]),
        (r"owners\[0\]", again.layout["ownership"]["owners"][0]),
    ):
        table["colour"] = 1
        with pytest.raises(UserError, match=rf"{where} has the unknown key 'colour'"):
            ownership_sections(again)
        del table["colour"]
    # a file from before: without memory by kind and without ownership
    old = json.loads((tmp_path / "plan.json").read_text())
    del old["memory"], old["layout"]["ownership"]
    assert ownership_sections(plans.plan_from_json(old)) == []
    with pytest.raises(UserError, match="unknown key 'colour'"):
        plans.plan_from_json({**old, "colour": 1})


def test_what_does_not_fit_is_named_with_its_remedies():
    setting = Setting(cluster=cluster(*a100(1, devices=4)), model=MODELS["llama-3-8b"], batch=(32_768,) * 80)
    assert decide(setting, seconds=1.0, plan_seconds=0.02) is None
    error = does_not_fit(setting, plan_seconds=0.02)
    assert isinstance(error, DoesNotFit)
    assert "on each of ranks 0-3 (A100-80GB)" in str(error)
    assert all(s.gigabytes > 0 for s in error.short)
    assert error.remedies
    seconds = [r.seconds for r in error.remedies]
    assert seconds == sorted(seconds)
    assert any("--batch-sequences" in r.what for r in error.remedies)
    assert json.loads(json.dumps(error.document()))["remedies"][0]["seconds"] == seconds[0]


def test_recomputation_is_as_it_was_fixed():
    setting = Setting(cluster=cluster(*a100(1, devices=2)), model=SMALL, batch=(8192,) * 4)
    both = [
        decide(replace(setting, checkpointing=again), seconds=1.0, plan_seconds=0.02).best for again in (False, True)
    ]
    assert [p.layout.checkpointing for p in both] == [False, True]
    assert both[1].seconds == pytest.approx(both[0].seconds * 4 / 3, rel=0.1)


def test_layer_inputs_wait_in_host_memory_where_devices_lack_room():
    hosts = cluster(*a100(1, devices=4, memory_gb=2000))
    setting = Setting(cluster=hosts, model=MODELS["llama-3-8b"], batch=(16_384,) * 40)
    layout = sharded(setting, Part((0, 1, 2, 3)), 10.0)
    assert layout is not None
    assert layout.inputs_on_host
    without = replace(setting, cluster=cluster(*a100(1, devices=4)))
    assert sharded(without, Part((0, 1, 2, 3)), 10.0) is None
