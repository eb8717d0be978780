import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from heteromesh.planner import plan as plans
from heteromesh.planner.cluster.links import Links
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.plan import Pass, Plan, PlannedCluster, Step
from heteromesh.planner.report.simulate import Disturbance, simulate_plan, simulate_step, slowed_seconds
from heteromesh.planner.report.simulate_nics import shared_nic_seconds
from heteromesh.planner.report.simulate_placement import simulate_placement
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.sequences.timeline import step_seconds
from heteromesh.planner.stages.predict import predict
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.runtime.cli.main import main
from instances import random_costs, random_lengths
from sites import batch, hosts


def planned(seed, ranks=4):
    rng = random.Random(seed)
    costs = replace(random_costs(rng, ranks, roomy=True), seconds_per_step=0.01)
    steps = [plan_step(random_lengths(rng, 300), costs, time_limit=0.02) for _ in range(3)]
    return steps, costs


@pytest.mark.parametrize("seed", range(6))
def test_an_undisturbed_step_takes_the_planned_seconds(seed):
    steps, costs = planned(seed)
    for run, step in zip(simulate_plan(steps, costs, Disturbance()), steps, strict=True):
        assert run.seconds == pytest.approx(step.seconds, rel=1e-12)
        assert run.seconds == step_seconds(step.passes, costs)
        assert not run.not_run
        for rank in range(4):
            assert run.busy[rank] + run.wait[rank] + costs.seconds_per_step == pytest.approx(run.seconds)


@pytest.mark.parametrize("seed", range(6))
def test_events_of_a_rank_fill_its_step_without_overlap(seed):
    steps, costs = planned(seed)
    runs = simulate_plan(steps, costs, Disturbance(slow={1: 1.7}))
    for rank in range(4):
        mine = sorted((e for run in runs for e in run.events if e.rank == rank), key=lambda e: e.start)
        for before, after in pairwise(mine):
            assert before.start + before.seconds == pytest.approx(after.start, abs=1e-9)
        assert mine[-1].start + mine[-1].seconds == pytest.approx(sum(run.seconds for run in runs))


def one_step(*passes, batch=(100, 100, 100)):
    return Step(passes=passes, seconds=0.0, bound_seconds=0.0, gap=0.0, solve_seconds=0.0, batch=batch)


def made(ranks, sequence, costs, method="local", tokens=100):
    shards = tuple((tokens // len(ranks),) for _ in ranks)
    seconds = costs.pass_seconds(ranks, method, [tokens], shards)
    return Pass(ranks=ranks, method=method, sequences=(sequence,), shards=shards, seconds=seconds)


def plain_costs(ranks=4, **changes):
    values = {
        "seconds_per_token2": 0.0,
        "seconds_per_token": 0.01,
        "seconds_per_pass": 0.5,
        "seconds_per_step": 0.25,
        "speeds": (1.0,) * ranks,
        "capacity": (1000,) * ranks,
        "methods": (Method(name="gather", bytes_per_token=1e7),),
        "rate": RateByDegree({4: 1e9}),
        "hosts": tuple(range(ranks)),
    }
    return Costs(**values | changes)


def test_a_slow_rank_stretches_its_compute_and_nothing_else():
    costs = plain_costs()
    alone, pair = made((0,), 0, costs), made((1, 2), 1, costs, "gather")
    assert alone.seconds == pytest.approx(1.5)
    assert slowed_seconds(alone, (100, 100, 100), costs, {0: 3.0}) == pytest.approx(3.5)
    assert slowed_seconds(pair, (100, 100, 100), costs, {2: 3.0}) == pytest.approx(pair.seconds + 1.0)
    assert slowed_seconds(pair, (100, 100, 100), costs, {0: 3.0}) == pair.seconds
    assert slowed_seconds(alone, (100, 100, 100), costs, {0: 0.5}) == pytest.approx(1.0)


def test_who_waits_for_a_slow_rank():
    costs = plain_costs(3)
    step = one_step(made((0,), 0, costs), made((1,), 1, costs), made((1, 2), 2, costs, "gather"))
    run = simulate_step(step, costs, {1: 2.0})
    # rank 1: 2.5 s alone, then 1 s compute (2 * 0.5), 0.5 s exchange, 0.5 s fixed, with rank 2 that waited for it
    assert run.seconds == pytest.approx(2.5 + 2.0 + 0.25)
    assert run.wait[2] == pytest.approx(2.5)
    assert run.wait[0] == pytest.approx(3.0)


def test_a_rank_that_fails_stops_its_passes_and_those_behind_them():
    costs = plain_costs()
    step = one_step(
        made((3,), 0, costs), made((0, 1), 1, costs, "gather"), made((1, 2), 2, costs, "gather"), batch=(100,) * 3
    )
    runs = simulate_plan([step, step, step], costs, Disturbance(fail=(0, 1)))
    assert [run.seconds is None for run in runs] == [False, True], "the third step never starts"
    assert runs[1].not_run == (1, 2)
    assert runs[1].stuck == (1, 2)
    assert runs[1].busy == pytest.approx((0, 0, 0, 1.5))
    assert not any(e.rank == 0 or e.category == "optimizer" for e in runs[1].events)


def test_passes_that_share_a_card_slow_each_other_down():
    links = Links(hosts=(0, 0, 1, 1), link=(1e12, 1e12), fabrics=("", ""), fabric_nics=(1e9, 1e9), ethernet=(1e9, 1e9))
    costs = plain_costs(
        rate=links, hosts=(0, 0, 1, 1), seconds_per_pass=0.0, methods=(Method(name="gather", bytes_per_token=1e9),)
    )
    apart = [made((0, 2), 0, costs, "gather"), made((1, 3), 1, costs, "gather")]
    both = one_step(*apart, batch=(100, 100))
    one = apart[0].seconds
    exchange = costs.pass_breakdown((0, 2), "gather", [100], apart[0].shards).exchange / one
    assert shared_nic_seconds(both, costs, {}) == pytest.approx(one * 2 * exchange + 0.25)
    after = one_step(apart[0], replace(apart[1], ranks=(0, 2)), batch=(100, 100))
    assert shared_nic_seconds(after, costs, {}) == pytest.approx(2 * one + 0.25)
    assert shared_nic_seconds(both, plain_costs(), {}) is None


# placements


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 5), (2, 1), (2, 6), (4, 8)])
def test_equal_stages_take_the_closed_form(stages, micro_batches):
    sites = hosts(*({} for _ in range(stages)), rdma=1e30, ethernet=1e30)
    work = batch(layers=3 * stages, micro_batches=micro_batches, boundary_bytes=0.0, layer_parameters=0)
    placement = Placement(
        stages=tuple(Stage(ranks=(s,), layers=3) for s in range(stages)), micro_batches=(micro_batches,)
    )
    run = simulate_placement(placement, sites, work)
    assert run.seconds == pytest.approx(3.0 * (micro_batches + stages - 1), abs=1e-2)
    assert run.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-3)
    assert run.busy == pytest.approx((3.0 * micro_batches,) * stages)


def test_the_simulation_is_the_prediction_and_gradient_sums_hide_under_the_last_backward():
    sites = hosts({}, {}, {"fabric": "roce"}, {"fabric": "roce"})
    work = batch(layer_parameters=10**9)
    roomy = replace(sites, hosts=tuple(replace(h, memory=1e13) for h in sites.hosts))
    placement = Placement(stages=(Stage(ranks=(0, 1), layers=4), Stage(ranks=(2, 3), layers=2)), micro_batches=(4, 4))
    run, predicted = simulate_placement(placement, roomy, work), predict(placement, roomy, work)
    assert run.seconds == predicted.seconds
    assert sum(predicted.sum_seconds) > 0
    assert run.hidden_sum > 0.5
    slower = simulate_placement(placement, roomy, work, {2: 3.0})
    assert slower.seconds > run.seconds
    sent = [e for e in run.events if e.rank == 0 and e.name.startswith("send forward")]
    assert [e.name for e in sent] == [f"send forward {m}" for m in range(4)]


# the command


@pytest.fixture
def plan_file(tmp_path):
    steps, costs = planned(3)
    path = tmp_path / "plan.json"
    plan = Plan(
        cluster=PlannedCluster(fingerprint="f", ranks=4),
        model="m",
        layout={"costs": costs_to_json(costs)},
        steps=tuple(steps),
        memory_bytes=(0,) * 4,
    )
    plans.dump(plan, path)
    return path


def call(capsys, *words):
    code = main(["simulate", *map(str, words)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_json_has_what_the_plan_predicts(plan_file, capsys):
    code, out, err = call(capsys, plan_file, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    for step, run in zip(plans.load(plan_file).steps, document["steps"], strict=True):
        assert run["seconds"] == pytest.approx(step.seconds)
    assert document["placement"] is None
    code, out, _ = call(capsys, plan_file, "--json", "--slow", "0=4", "--slow", "1=4", "--slow", "2=4", "--slow", "3=4")
    slower = json.loads(out)
    assert slower["slow"] == {"0": 4, "1": 4, "2": 4, "3": 4}
    assert all(s["seconds"] > p["seconds"] for s, p in zip(slower["steps"], document["steps"], strict=True))


def test_text_and_trace(plan_file, capsys, tmp_path):
    trace = tmp_path / "trace.json"
    code, out, err = call(capsys, plan_file, "-o", trace)
    assert (code, err) == (0, "")
    assert "nothing disturbs it" in out
    assert "1.000" in out
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1, 2, 3}
    assert {e["cat"] for e in events if e["ph"] == "X"} <= {"pass", "wait", "optimizer"}
    last = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert last / 1e6 == pytest.approx(sum(s.seconds for s in plans.load(plan_file).steps), rel=1e-6)


def test_a_failure_says_what_happens(plan_file, capsys):
    code, out, _ = call(capsys, plan_file, "--fail", "2@1")
    assert code == 0
    assert "rank 2 fails at step 1" in out
    assert "the step can't finish" in out
    document = json.loads(call(capsys, plan_file, "--fail", "2@1", "--json")[1])
    assert [s["seconds"] is None for s in document["steps"]] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slow", "4=2"), "rank '4' must be a whole number from 0 to 3"),
        (("--slow=-1=2",), "rank '-1' must be"),
        (("--slow", "1"), "the factor must be a number above 0"),
        (("--slow", "1=0"), "the factor must be a number above 0"),
        (("--slow", "1=nan"), "the factor must be a number above 0"),
        (("--slow", "1=2", "--slow", "1=3"), "rank 1 was given before"),
        (("--fail", "1"), "names no step: write RANK@STEP"),
        (("--fail", "1@0", "--fail", "2@0"), "--fail is given 2 times"),
        (("--fail", "1@3"), "step '3' must be a whole number from 0 to 2"),
        (("--fail", "9@0"), "rank '9' must be"),
        (("-o", "no-such-directory/t.json"), "create no-such-directory first"),
        (("-o", "."), "-o . is a directory"),
        (("--speed", "1"), "unrecognized arguments"),
    ],
)
def test_bad_arguments(plan_file, capsys, words, message):
    code, out, err = call(capsys, plan_file, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": {}}, "carries no cost model"),
        ({"steps": []}, "has no step"),
        ({"schema": 7}, "plan schema 7 is not 1"),
        ({"cluster": {"fingerprint": "f", "ranks": 3}}, "is for 3 ranks but its costs have 4"),
    ],
)
def test_bad_plans(plan_file, capsys, change, message):
    plan_file.write_text(json.dumps(json.loads(plan_file.read_text()) | change))
    code, out, err = call(capsys, plan_file)
    assert (code, out) == (2, "")
    assert message in err


def test_a_plan_over_two_fabrics_has_a_placement_that_can_be_simulated(tmp_path, capsys):
    (tmp_path / "c.toml").write_text(
        '[[hosts]]\nnames = ["a", "b"]\ndevice = "A100-80GB"\ncount = 2\nfabric = "ib0"\n'
        'nics = [{ kind = "infiniband", gbit = 200 }, { kind = "ethernet", gbit = 25 }]\n'
        '[[hosts]]\nnames = ["c", "d"]\ndevice = "A100-80GB"\ncount = 2\nfabric = "roce0"\n'
        'nics = [{ kind = "roce", gbit = 200 }, { kind = "ethernet", gbit = 25 }]\n'
    )
    words = ["plan", "--cluster", tmp_path / "c.toml", "--model", "gpt-7b", "--lengths", "lognormal:6,1,2000"]
    path, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    assert main([str(w) for w in [*words, "--batch-sequences", "64", "-o", path]]) == 0
    text = capsys.readouterr().out
    assert "Placement  " in text
    assert "Against  placement, " in text
    placement = plans.load(path).layout["placement"]
    assert {c["family"] for c in placement["candidates"]} == {
        "pipeline across fabrics",
        "hierarchical data parallel across fabrics",
    }
    assert placement["predicted"]["seconds"] >= placement["predicted"]["bound_seconds"] > 0
    code, out, _ = call(capsys, path, "--json", "-o", trace)
    assert code == 0
    assert json.loads(out)["placement"]["seconds"] == pytest.approx(placement["predicted"]["seconds"])
    assert json.loads((tmp_path / "trace-placement.json").read_text())["traceEvents"]
    data = json.loads(path.read_text())
    data["layout"]["placement"]["colour"] = 1
    path.write_text(json.dumps(data))
    code, _, err = call(capsys, path)
    assert code == 2
    assert "layout.placement has the unknown key 'colour'" in err
