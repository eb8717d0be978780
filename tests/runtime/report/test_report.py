"""`heteromesh report`: ordinary runs, runs of changing members, damaged files, bad input."""

import json
import math
from html.parser import HTMLParser

import pytest

from heteromesh.runtime.cli.main import main
from heteromesh.runtime.report.report_facts import read_facts
from heteromesh.runtime.report.report_page import page
from heteromesh.runtime.report.report_svg import bars, lines, spans, thin


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def metrics(step, **changes):
    told = {"step": step, "loss": 5 / step, "tokens": 100, "predicted_seconds": 1.0, "measured_seconds": 1.25}
    waits = {"plan_wait_seconds": 0.01, "data_wait_seconds": 0.02, "exposed_comm_seconds": 0.03}
    return told | waits | changes


def plan(step, busy=(1.0, 0.5), seconds=1.25):
    measured = {"seconds": seconds, "busy_seconds": list(busy), "passes": [], "plan_wait_seconds": 0.0}
    return {"step": step, "plan": {"seconds": 1.0, "passes": []}, "measured": measured}


def event(at, kind, **facts):
    return {"time": 1_800_000_000 + at, "kind": kind, **facts}


EVENTS = (
    event(0, "joined", member=1, name="a:0", address="10.0.0.1"),
    event(0.5, "joined", member=2, name="<b>&", address="10.0.0.2"),
    event(1, "epoch", group="world", epoch=1, members=[1, 2], names=["a:0", "<b>&"], committed=0),
    event(5, "records", group="world", names=["a:0", "<b>&"], delays=[[None, 1e-8], [4e-7, None]], seconds=[2, 2],
          blocked=[1, 0.5]),
    event(6, "diagnosis", syndrome="communication slow", place="link", names=["<b>&", "a:0"], operation="all_reduce",
          sequence=7, group="world", why="2.5 MB/s", action="ignore"),
    event(8, "lost", member=2, name="<b>&", reason="silent"),
    event(9, "joined", member=3, name="<b>&", address="10.0.0.2"),
    event(10, "epoch", group="world", epoch=2, members=[1, 3], names=["a:0", "<b>&"], committed=3),
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "metrics.jsonl", *(metrics(step) for step in range(1, 5)))
    write(tmp_path / "plan.jsonl", *(plan(step) for step in range(1, 5)))
    write(tmp_path / "events.jsonl", *EVENTS)
    config = {"trainer": {"max_steps": 4, "cluster": None}, "ranks": 2, "cluster": {"name": "lab & co"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


class Checker(HTMLParser):
    """Tags must close, and nothing may be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "img", "iframe", "link", "object")
        assert not {"src", "href", "onclick"} & {name for name, _ in attributes}
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def checked(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert "http" not in html
    assert "url(" not in html
    return checker


def test_page_of_a_run_of_changing_members(run, capsys):
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert str(run / "report.html") in out
    assert "4 steps, 1.25 s each (median), predicted within 20.0% (median), 3 members, 1 lost, 1 diagnoses" in out
    html = (run / "report.html").read_text()
    seen = checked(html)
    text = "".join(seen.text)
    assert "<b>&" not in html
    assert "communication slow: link <b>& to a:0 in all_reduce 7 of group world: 2.5 MB/s; ignore" in text
    assert "<b>& (member 2): silent" in text
    assert "lab & co" in text
    assert seen.tags.count("svg") == 4
    assert "400" in text  # ms for a MB of the slow link
    assert not list(run.glob("*.part"))


def test_facts_are_the_same_as_one_json_document(run, capsys):
    assert main(["report", str(run), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["summary"] | {"median_error": None} == {
        "steps": 4, "first_step": 1, "last_step": 4, "first_loss": 5.0, "last_loss": 1.25, "tokens": 400.0,
        "seconds": 5.0, "predicted": 4.0, "median_error": None, "members": 3, "losses_of_members": 1, "diagnoses": 1,
    }  # fmt: skip
    assert data["summary"]["median_error"] == pytest.approx(0.2)
    assert data["ranks"] == [
        {"rank": 0, "steps": 4, "busy": 4.0, "wait": 1.0},
        {"rank": 1, "steps": 4, "busy": 2.0, "wait": 3.0},
    ]
    assert [(s["member"], s["lost"], s["reason"]) for s in data["stays"]] == [
        (1, None, ""),
        (2, 8.0, "silent"),
        (3, None, ""),
    ]
    assert data["delays"][0]["matrix"] == [[None, 1e-8], [4e-7, None]]
    assert data["delays"][0]["blocked"] == [0.5, 0.25]
    assert data["settings"] == {"max_steps": 4, "ranks": 2, "cluster": "lab & co"}
    assert not (run / "report.html").exists()


def test_page_and_json_together(run, tmp_path, capsys):
    assert main(["report", str(run), "--json", "-o", str(tmp_path / "page.html")]) == 0
    json.loads(capsys.readouterr().out)
    checked((tmp_path / "page.html").read_text())


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.jsonl", "events.jsonl"])
def test_each_file_is_enough(run, name, capsys):
    for other in ("metrics.jsonl", "plan.jsonl", "events.jsonl", "config.json"):
        if other != name:
            (run / other).unlink()
    assert main(["report", str(run)]) == 0
    checked((run / "report.html").read_text())


def test_resumed_steps_count_once_and_the_later_stands(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics(3, measured_seconds=9.0)) + "\n")
    steps = read_facts(run).steps
    assert [s.step for s in steps] == [1, 2, 3, 4]
    assert steps[2].measured == 9.0


def test_half_written_last_line_and_damaged_ones(run):
    for name in ("metrics.jsonl", "plan.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 5, "lo')
    facts = read_facts(run)
    assert facts.summary.steps == 4
    assert facts.unreadable_lines == 0
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe garbage\n[1]\n" + text.encode())
    assert read_facts(run).unreadable_lines == 2
    assert "2, left out here" in page(read_facts(run))
    (run / "config.json").write_text("{")
    assert read_facts(run).settings == {}


def test_values_of_wrong_types_are_left_out(run, capsys):
    write(
        run / "metrics.jsonl",
        metrics(1, loss=math.nan, tokens="many"),
        metrics(1) | {"step": True},
        {"step": "2"},
        {"a": 1},
    )
    write(
        run / "plan.jsonl", {"step": 1, "plan": 3, "measured": None}, plan(2, busy=("x", None)), plan(3, seconds=None)
    )
    (run / "events.jsonl").write_text(
        '{"time": "now", "kind": "joined"}\n{"time": 1, "kind": 7}\n{"time": 1e999, "kind": "x"}\n'
        '{"time": 1, "kind": "odd", "value": NaN}\n{"time": 2, "kind": "records", "names": ["a"], "delays": [[1, 2]]}\n'
        '{"time": 3, "kind": "lost", "member": 5}\n{"time": 4, "kind": "joined", "member": "x"}\n'
    )
    assert main(["report", str(run), "--json", "-o", str(run / "r.html")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [s["step"] for s in data["steps"]] == [1, 2, 3]
    assert data["steps"][0]["loss"] is None
    assert data["ranks"] == []
    assert data["delays"] == []
    assert data["stays"] == []
    checked((run / "r.html").read_text())


def refused(capsys, *words):
    assert main(["report", *map(str, words)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_bad_input(tmp_path, run, capsys):
    assert "does not exist: give the run_dir" in refused(capsys, tmp_path / "none")
    assert "is a file" in refused(capsys, run / "config.json")
    (tmp_path / "empty").mkdir()
    assert "holds no step and no event" in refused(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step"')
    assert "holds no step and no event" in refused(capsys, tmp_path / "empty")
    assert "is a directory: name a file" in refused(capsys, run, "-o", tmp_path)
    assert "can't be written (No such file or directory)" in refused(capsys, run, "-o", tmp_path / "no" / "r.html")
    assert "required" in refused(capsys)
    (run / "plan.jsonl").unlink()
    (run / "plan.jsonl").mkdir()
    assert "plan.jsonl can't be read (Is a directory)" in refused(capsys, run)


def test_long_runs_are_drawn_with_few_points():
    series = [(float(x), float(x % 7)) for x in range(100_000)]
    assert len(thin(series)) <= 400
    assert thin(series)[-1][0] == 99_999
    assert thin(series[:10]) == series[:10]
    drawn = lines("t", "s", [("a", "measured", series)])
    assert len(drawn) < 20_000
    checked(drawn)


def test_charts_of_nothing_are_not_drawn():
    assert lines("t", "s", [("a", "x", [(1.0, None)])]) == ""
    assert bars("t", [("a", [("busy", 0.0)])]) == ""
    assert spans("t", [], [], 1.0) == ""


def test_charts_of_one_value_and_of_gaps():
    for series in ([(3.0, 0.0)], [(1.0, 2.0), (2.0, None), (3.0, -2.0)]):
        drawn = lines("<t>", "s", [("<a>", "x", series)])
        checked(drawn)
        assert "nan" not in drawn
    checked(spans("t", [("<x>", [(0.0, 0.0, "stay", "<y>")])], [(0.0, "epoch", "<z>")], 0.0))


def test_numbers_that_no_run_measures_are_left_out(run, capsys):
    with open(run / "metrics.jsonl", "a") as file:
        for step, seconds in ((5, "1e308"), (6, "1e308"), (7, "1" + "0" * 400)):
            file.write(f'{{"step": {step}, "loss": 1.0, "tokens": 100, "measured_seconds": {seconds}}}\n')
    assert main(["report", str(run)]) == 0
    checked((run / "report.html").read_text())
    capsys.readouterr()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["seconds"] == 5.0
