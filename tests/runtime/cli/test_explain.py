import json
import math
from dataclasses import replace

import pytest

from heteromesh.planner import plan as plans
from heteromesh.planner.cluster.cluster import local_cluster
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.cost.shards import make_pass
from heteromesh.planner.plan import Plan, PlannedCluster, Rejected, Step
from heteromesh.planner.report.tables import rank_list, table
from heteromesh.planner.report.text import imbalance, shape
from heteromesh.planner.report.why import explain_step
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.sequences.timeline import in_order, starts
from heteromesh.runtime.cli.main import main
from heteromesh.runtime.report.compare import compare_run, read_run


def costs(**changes):
    settings = {
        "seconds_per_token2": 1e-8,
        "seconds_per_token": 1e-4,
        "seconds_per_pass": 0.01,
        "seconds_per_split_pass": 0.005,
        "seconds_per_step": 0.02,
        "speeds": (1.0, 1.0, 0.5, 0.5),
        "capacity": (1000,) * 4,
        "methods": (Method(name="ulysses", bytes_per_token=1e5, scaling="fraction", heads=8),),
        "rate": RateByDegree({2: 1e9, 4: 1e9}),
        "hosts": (0, 0, 0, 0),
    }
    return Costs(**(settings | changes))


def make_step(teams, batch, model):
    """A step of the given (ranks, sequences) in order."""
    made = [make_pass(ranks, "ulysses" if len(ranks) > 1 else "local", seqs, batch, model) for ranks, seqs in teams]
    passes = in_order(made, model.ranks)
    seconds = max(starts(passes, model.ranks)[1]) + model.seconds_per_step
    return Step(passes=passes, seconds=seconds, bound_seconds=seconds / 2, gap=1.0, solve_seconds=0.001, batch=batch)


BATCH = (1600, 900, 300, 100, 50)
TEAMS = [((0, 1, 2), (0,)), ((0,), (1,)), ((3,), (2,)), ((1, 2), (3,)), ((2,), (4,))]


@pytest.fixture
def step():
    return make_step(TEAMS, BATCH, costs())


def write_plan(path, steps, model):
    layout = {"costs": costs_to_json(model)}
    plan = Plan(
        cluster=PlannedCluster(fingerprint=local_cluster(4).fingerprint, ranks=4),
        model="tiny",
        layout=layout,
        steps=tuple(steps),
        memory_bytes=(1, 1, 1, 1),
        rejected=(Rejected(what="static data parallel", why="infeasible"),),
    )
    plans.dump(plan, path)
    return plan


def test_parts_sum_to_the_seconds_of_the_last_rank(step):
    why = explain_step(step, costs())
    _, ends = starts(step.passes, 4)
    assert ends[why.critical_rank] == max(ends)
    assert why.compute + why.exchange + why.fixed + why.idle + why.step_fixed == pytest.approx(step.seconds)
    assert why.step_fixed == pytest.approx(0.02)
    own = [p for p in step.passes if why.critical_rank in p.ranks]
    assert why.fixed == pytest.approx(sum(0.01 + 0.005 * (len(p.ranks) > 1) for p in own))
    assert why.exchange > 0


def test_exchange_is_what_free_wires_would_save(step):
    # every pass alone, against its own seconds under a model whose wires cost nothing
    free = costs(rate=RateByDegree({2: math.inf}))
    for p, reason in zip(step.passes, explain_step(step, costs()).passes, strict=True):
        lengths = [BATCH[k] for k in p.sequences]
        saved = p.seconds - free.pass_seconds(p.ranks, p.method, lengths, p.shards)
        assert reason.exchange == pytest.approx(saved, abs=1e-12)
        assert reason.compute + reason.exchange + reason.fixed == pytest.approx(p.seconds)


def test_idle_is_the_wait_for_partners():
    model = costs(methods=(Method(name="ulysses", bytes_per_token=0.0),), speeds=(1.0,) * 4)
    # both end together, and the lower rank counts: it waits while rank 1 works alone for longer
    waiting = make_step([((1,), (0,)), ((0,), (1,)), ((0, 1), (2,))], (900, 10, 1000), model)
    why = explain_step(waiting, model)
    longer, shorter = (p.seconds for p in waiting.passes if len(p.ranks) == 1)
    assert why.critical_rank == 0
    assert why.idle == pytest.approx(longer - shorter)
    assert why.compute + why.exchange + why.fixed + why.idle + why.step_fixed == pytest.approx(waiting.seconds)


def test_neighbouring_degrees_are_priced_or_ruled_out(step):
    reasons = explain_step(step, costs()).passes
    first = reasons[0]
    assert [o.degree for o in first.options] == [1, 3, 4]
    assert first.options[0].obstacle == "does not fit, 1600 tokens for 1000"
    assert first.options[1].seconds == first.seconds
    wider = make_pass((0, 1, 2, 3), "ulysses", (0,), BATCH, costs())
    assert first.options[2].seconds == wider.seconds
    assert first.rank_seconds == pytest.approx(first.seconds * 3)
    local = next(r for r in reasons if r.ranks == (0,))
    assert [o.degree for o in local.options] == [1, 2]


def test_reasons_tell_cases_apart():
    model = costs(speeds=(1.0,) * 4)
    alone = make_step([((0,), (0,))], (100,), model)
    assert explain_step(alone, model).passes[0].reason == "the cheapest of these degrees"
    forced = make_step([((0, 1), (0,))], (1500,), model)
    assert explain_step(forced, model).passes[0].reason == "the fewest ranks that hold it"
    single = costs(speeds=(1.0,), capacity=(1000,), hosts=(0,), methods=())
    assert explain_step(make_step([((0,), (0,))], (9,), single), single).passes[0].reason == (
        "the only degree that is possible"
    )
    # 3 of 4 ranks: degree 1 does not hold it, degree 2 does
    assert "fewest" not in explain_step(make_step([((0, 1, 2), (0,))], (1600,), model), model).passes[0].reason
    spread = make_step([((0, 1), (0,))], (900,), model)
    assert "would take longer than the whole step" in explain_step(spread, model).passes[0].reason
    busy = make_step([((0, 1), (0,)), ((2,), (1,))], (900, 1000), model)
    assert "rank-seconds cheaper; this one evens out" in explain_step(busy, model).passes[0].reason


def test_a_method_that_may_not_split_so_far_is_said():
    model = costs(speeds=(1.0,) * 4, methods=(Method(name="ulysses", bytes_per_token=1e5, heads=2),))
    split = make_step([((0, 1), (0,))], (1500,), model)
    widest = explain_step(split, model).passes[0].options[-1]
    assert (widest.degree, widest.obstacle) == (4, "no method splits over so many ranks")


def test_explains_what_the_planner_makes():
    model = costs()
    lengths = [2500, 900, 900, 400, 300, 200, 100, 50, 20, 10]
    planned = plan_step(lengths, model)
    why = explain_step(planned, model)
    assert why.compute + why.exchange + why.fixed + why.idle + why.step_fixed == pytest.approx(planned.seconds)
    assert all(reason.options for reason in why.passes)


def test_text_and_json_of_a_plan(tmp_path, step, capsys):
    write_plan(tmp_path / "plan.json", [step, step], costs())
    assert main(["explain", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert "Plan     tiny on 4 ranks, 2 steps" in out
    assert "<3,2,1x3>" in out
    assert "degree   1: does not fit, 1600 tokens for 1000" in out
    assert "Rejected  static data parallel: infeasible" in out
    assert main(["explain", "--json", str(tmp_path / "plan.json")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["steps"]) == 2
    assert data["steps"][0]["passes"][0]["options"][0]["degree"] == 1


def refused(capsys, *words):
    assert main(["explain", *map(str, words)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_bad_plans(tmp_path, step, capsys):
    path = tmp_path / "plan.json"
    assert "does not exist" in refused(capsys, path)
    plan = write_plan(path, [step], costs())
    data = json.loads(path.read_text())
    path.write_text('{\n"schema": 1,\n')
    assert "line 3 is not JSON" in refused(capsys, path)
    path.write_text(json.dumps(data | {"colour": 3}))
    assert "unknown key 'colour'" in refused(capsys, path)
    path.write_text(json.dumps(data | {"schema": 2}))
    assert "plan schema 2 is not 1" in refused(capsys, path)
    plans.dump(replace(plan, layout={}), path)
    assert "carries no cost model" in refused(capsys, path)
    plans.dump(replace(plan, steps=()), path)
    assert "has no step" in refused(capsys, path)
    plans.dump(replace(plan, cluster=PlannedCluster(fingerprint="x", ranks=5)), path)
    assert "is for 5 ranks but its costs have 4" in refused(capsys, path)
    assert "required: plan.json | RUN_DIR" in refused(capsys)


def write_run(directory, step, factors, *, slow=None):
    """A run whose step i took factors[i] times its prediction; rank `slow` is twice as slow in its passes."""
    lines = []
    for index, factor in enumerate(factors, start=1):
        spent = [
            {"position": i, "rank": r, "seconds": p.seconds * factor * (2 if r == slow else 1)}
            for i, p in enumerate(step.passes)
            for r in p.ranks
        ]
        busy = [sum(s["seconds"] for s in spent if s["rank"] == r) for r in range(4)]
        measured = {
            "seconds": step.seconds * factor,
            "busy_seconds": busy,
            "passes": spent,
            "plan_wait_seconds": 0.01 * step.seconds * factor,
        }
        lines.append(json.dumps({"step": index, "plan": plans.to_json(step), "measured": measured}))
    directory.mkdir(exist_ok=True)
    (directory / "plan.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "config.json").write_text(json.dumps({"costs": costs_to_json(costs())}))
    return lines


def test_run_beside_plan(tmp_path, step):
    factors = [1.0, 1.25, 2.0, 0.8, 1.0]
    write_run(tmp_path / "run", step, factors, slow=3)
    run = compare_run(read_run(tmp_path / "run"))
    assert [s.error for s in run.steps] == pytest.approx([0.0, -0.2, -0.5, 0.25, 0.0])
    assert run.median_error == pytest.approx(0.2)
    assert run.p90_error == pytest.approx(0.5)
    assert run.predicted == pytest.approx(5 * step.seconds)
    assert run.measured == pytest.approx(sum(factors) * step.seconds)
    assert run.plan_wait_share == pytest.approx(0.01)
    assert [r.slow for r in run.ranks] == [False, False, False, True]
    assert run.ranks[3].ratio == pytest.approx(2 * sum(factors) / 5)
    assert [(d.degree, d.passes) for d in run.degrees] == [(1, 15), (2, 5), (3, 5)]
    assert run.degrees[1].ratio == pytest.approx(sum(factors) / 5)
    parts = run.parts
    assert parts.compute + parts.exchange + parts.fixed + parts.idle + parts.step_fixed == pytest.approx(run.predicted)


def test_text_and_json_of_a_run(tmp_path, step, capsys):
    write_run(tmp_path / "run", step, [1.0] * 24, slow=1)
    assert main(["explain", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "Run      24 steps, the last 20:" in out
    assert "slower than the others" in out
    assert out.strip().endswith("median 0.0%, p90 0.0%; waited for plans 1.00%; slow ranks: 1")
    assert main(["explain", str(tmp_path / "run"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["steps"]) == 24


def test_a_step_that_was_done_again_counts_once(tmp_path, step):
    lines = write_run(tmp_path / "run", step, [1.0, 2.0])
    again = json.loads(lines[1])
    again["measured"]["seconds"] = step.seconds
    with (tmp_path / "run" / "plan.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n" + lines[0][:50])  # and a line cut short by a kill
    run = compare_run(read_run(tmp_path / "run"))
    assert [(s.step, s.error) for s in run.steps] == [(1, 0.0), (2, 0.0)]


def test_bad_runs(tmp_path, step, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert "plan.jsonl does not exist" in refused(capsys, run)
    lines = write_run(run, step, [1.0])
    (run / "plan.jsonl").write_text("")
    assert "no measured step yet" in refused(capsys, run)
    (run / "plan.jsonl").write_text(f"oops\n{lines[0]}\n")
    assert "line 1 is not JSON" in refused(capsys, run)
    (run / "plan.jsonl").write_text(f"[]\n{lines[0]}\n")
    assert "line 1 is not a measured step" in refused(capsys, run)
    (run / "plan.jsonl").write_text(lines[0].replace('"busy_seconds"', '"bussy_seconds"') + "\n")
    assert "line 1 is not a measured step" in refused(capsys, run)
    (run / "plan.jsonl").write_text(lines[0].replace('"gap"', '"gab"') + "\n")
    assert "unknown key 'gab'" in refused(capsys, run)
    write_run(run, step, [1.0])
    (run / "config.json").write_text("{}")
    assert "config.json has no cost model" in refused(capsys, run)
    (run / "config.json").unlink()
    assert "config.json does not exist" in refused(capsys, run)


def test_small_words():
    assert rank_list([3, 0, 1, 2, 7, 9, 10]) == "0-3,7,9-10"
    assert table(("n", "<word"), [("1", "a"), ("10", "bcd")]) == " n  word\n 1  a\n10  bcd"


def test_shape_and_imbalance(step):
    assert shape(step) == "<3,2,1x3>"
    model = costs(speeds=(1.0,) * 4)
    even = make_step([((r,), (r,)) for r in range(4)], (500,) * 4, model)
    assert imbalance(even, 4) == pytest.approx(1.0)
    lone = make_step([((0,), (0,))], (500,), model)
    assert imbalance(lone, 4) == pytest.approx(4.0)
