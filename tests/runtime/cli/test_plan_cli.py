import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from heteromesh.planner import plan as plans
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.cost.json import costs_from_json
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.model.spec import load_model
from heteromesh.planner.report import assemble
from heteromesh.planner.report.check import check_step
from heteromesh.planner.report.fixes import Fixes
from heteromesh.planner.report.text import plan_text
from heteromesh.planner.sequences import step as step_planner
from heteromesh.runtime.cli import plan
from heteromesh.runtime.cli.main import main

EXAMPLES = Path(__file__).parents[3] / "examples"
CLUSTER = """
[[hosts]]
names = ["a", "b"]
device = "A100-40GB"
count = 2
fabric = "ib0"
nics = [{ kind = "infiniband", gbit = 200 }]
"""
COST = """
seconds_per_token2 = 1e-9
seconds_per_token = 1e-4
seconds_per_pass = 0.05
bytes_per_token = 1e5
tokens_per_device = 1000
[bytes_per_second]
2 = 1e10
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    (tmp_path / "cost.toml").write_text(COST)
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, [700, 1500, 300, 200, 90, 800, 40, 1100, 60, 500])))
    return tmp_path


@pytest.fixture
def run(files, capsys):
    """Runs `heteromesh plan` on the files; keyword arguments replace or (None) remove flags."""

    def call(*words, **flags):
        given = {"cluster": files / "cluster.toml", "model": "gpt-7b", "lengths": files / "lengths.txt"}
        given |= {"cost": files / "cost.toml"} | flags
        pairs = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        code = main(["plan", *pairs, *words])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def sentence(result):
    """The one line of a refusal."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("heteromesh: error: ")
    assert err.count("\n") == 1
    return err.strip()


def test_text_shows_problem_steps_passes_memory_and_summary(run):
    code, out, err = run("--batch-sequences", "5", "--steps", "2")
    assert (code, err) == (0, "")
    assert "cluster: 2 hosts, 4 ranks (4 x A100-40GB)" in out
    assert "gpt-7b: 6.85 B parameters" in out
    assert "cost file: 1000 tokens fit a device; ways to split: ulysses" in out
    assert "lengths.txt, in order; 5 sequences a step" in out
    assert out.count("Against  static ") == 2
    assert "static data parallel: infeasible in step 0: sequence 1 has 1500 tokens" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("Plan: 2 steps on 4 ranks, ")
    assert "x the speed of static sequence parallel on all ranks" in last
    assert "\x1b" not in out


def test_json_is_the_plan_file_and_nothing_else(run, files):
    code, out, err = run("--json", "-o", str(files / "plan.json"))
    assert code == 0
    assert json.loads(out) == json.loads((files / "plan.json").read_text())
    assert "wrote" in err
    plan = plans.load(files / "plan.json")
    assert plan.cluster.ranks == 4
    assert plan.model == "gpt-7b"
    assert [r.what for r in plan.rejected] == [
        "static sequence parallel on all ranks",
        "static data parallel",
        "static, best even degree for each step",
    ]
    assert plan.layout["cost_source"] == "cost file"
    costs = costs_from_json(plan.layout["costs"], "plan")
    for step in plan.steps:
        check_step(step, costs)


def test_memory_is_the_fullest_pass_of_each_rank(run):
    plan = plans.plan_from_json(json.loads(run("--json")[1]))
    per_token = plan.layout["parameters"]["activation_bytes_per_token"]
    for rank in range(4):
        held = [p.tokens(p.ranks.index(rank)) for s in plan.steps for p in s.passes if rank in p.ranks]
        assert plan.memory_bytes[rank] == max(held) * per_token
    full = plans.plan_from_json(
        json.loads(run("--json", cost=None, cluster=EXAMPLES / "clusters/mixed-3-hosts.toml")[1])
    )
    state = full.layout["parameters"]["state_bytes_per_rank"]
    assert max(full.memory_bytes) > state > 6 * 6.8e9
    working = set(full.layout["ownership"]["working"])
    assert {r for s in full.steps for p in s.passes for r in p.ranks} <= working
    for rank, (total, kinds) in enumerate(zip(full.memory_bytes, full.memory, strict=True)):
        assert total == sum(kinds.values()) - kinds["context"]
        assert bool(total) == (rank in working)


def test_batches_by_tokens_and_the_end_of_a_file(run):
    code, out, err = run("--batch_tokens=2000", "--steps", "9", "--json")
    assert code == 0
    batches = [step["batch"] for step in json.loads(out)["steps"]]
    assert batches == [[700], [1500, 300, 200], [90, 800, 40], [1100, 60, 500]]
    assert err.strip() == "lengths.txt ended: 4 steps were planned of 9"


def test_fixes_bind(run):
    degrees = lambda out: {len(p["ranks"]) for s in json.loads(out)["steps"] for p in s["passes"]}  # noqa: E731
    assert degrees(run("--json", "--fix", "max_degree=2")[1]) <= {1, 2}
    code, out, err = run("--json", "--fix", "method=local", "--fix", "max-length=999")
    assert code == 0
    assert degrees(out) == {1}
    assert err.strip() == "dropped 2 sequences longer than max_length=999"
    assert json.loads(out)["layout"]["fixed"] == {"method": "local", "max_length": 999}
    message = sentence(run("--fix", "method=local"))
    assert "sequence 1 has 1500 tokens but at most 1000 fit" in message


def test_seed_decides_sampled_lengths(run):
    def batch(seed):
        words = ("--json", "--seed", seed, "--batch-sequences", "20")
        return json.loads(run(*words, lengths="lognormal:5,1,900")[1])["steps"][0]["batch"]

    assert batch("1") == batch("1")
    assert batch("1") != batch("2")


def test_dashes_and_underscores_are_the_same(run):
    assert run("--batch_sequences", "3", "--time_limit=0.1", "--json")[0] == 0
    assert run("--batch-sequences", "3", "--time-limit=0.1", "--json")[0] == 0


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        ((), {"cluster": None}, "the following arguments are required: --cluster"),
        (("--colour", "3"), {}, "unrecognized arguments: --colour 3"),
        (("--batch-tokens", "9", "--batch-sequences", "9"), {}, "not allowed with argument"),
        (("--batch-tokens", "0"), {}, "'0' must be a whole number, at least 1"),
        (("--steps", "-1"), {}, "'-1' must be a whole number, at least 1"),
        (("--steps", "nan"), {}, "'nan' must be a whole number"),
        (("--seed", "x"), {}, "'x' must be a whole number, at least 0"),
        (("--time-limit", "nan"), {}, "'nan' must be a number of seconds above 0"),
        (("--time-limit", "0"), {}, "'0' must be a number of seconds above 0"),
        (("--step", "3"), {}, "unrecognized arguments: --step 3"),
        ((), {"model": "gpt-8b"}, "'gpt-8b' is not built in: use one of gpt-7b"),
        ((), {"cluster": "none.toml"}, "cluster file none.toml does not exist"),
        ((), {"cost": "none.toml"}, "cost file none.toml does not exist"),
        ((), {"lengths": "none.txt"}, "lengths file none.txt does not exist"),
        ((), {"model": "none.json"}, "model file none.json does not exist"),
        (("--fix", "colour=3"), {}, "--fix colour=3 names nothing that can be fixed"),
        (("-o", "no-such-directory/plan.json"), {}, "create no-such-directory first"),
        (("-o", "."), {}, "-o . is a directory"),
    ],
)
def test_bad_arguments(run, words, flags, message):
    assert message in sentence(run(*words, **flags))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cluster.toml", "[[hosts]\n", "cluster.toml line 1 is not TOML"),
        ("cluster.toml", CLUSTER + "colour = 3\n", "unknown key 'colour'"),
        ("cost.toml", COST.replace("1e-4", "nan"), "seconds_per_token is nan: it must be zero or more and finite"),
        ("lengths.txt", "700\n0\n", "lengths.txt line 2 is '0'"),
        ("lengths.txt", "700\n-5\n", "lengths.txt line 2 is '-5'"),
        ("lengths.txt", "nan\n", "lengths.txt line 1 is 'nan'"),
        ("lengths.txt", "1.5\n", "lengths.txt line 1 is '1.5'"),
        ("lengths.txt", "", "holds no length"),
    ],
)
def test_bad_files(run, files, name, content, message):
    (files / name).write_text(content)
    assert message in sentence(run("-o", str(files / "plan.json")))
    assert not (files / "plan.json").exists()


def test_a_sequence_that_fits_nowhere_says_what_fits(run, files):
    (files / "lengths.txt").write_text("10\n4001\n")
    message = sentence(run("-o", str(files / "plan.json")))
    assert "sequence 1 has 4001 tokens but at most 4000 fit" in message
    assert "raise" in message
    assert not (files / "plan.json").exists()


def test_a_model_that_does_not_fit(run):
    message = sentence(run(model="llama-3-70b", cost=None))
    assert "model llama-3-70b does not fit on this cluster" in message
    assert "GB on each of ranks 0-3 (A100-40GB)" in message
    code, out, err = run("--json", model="llama-3-70b", cost=None)
    assert code == 2
    assert err
    told = json.loads(out)
    assert [s["ranks"] for s in told["short"]] == [[0, 1, 2, 3]] * 2
    # 8 bytes a parameter whole, 8 over 4 ranks; 18 over 4 ranks and the embeddings whole: 36 GB a device can be used
    assert told["short"][0]["gigabytes"] == pytest.approx(70.55 * 10 - 36, rel=0.01)
    assert told["short"][1]["gigabytes"] == pytest.approx(70.55 * 18 / 4 + 6 * 2.1 - 36, rel=0.05)


def test_a_full_disk_leaves_no_half_file(run, files, monkeypatch):
    def full(self, text):
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    message = sentence(run("-o", str(files / "plan.json")))
    assert "can't be written (No space left on device)" in message
    assert sorted(p.name for p in files.iterdir()) == ["cluster.toml", "cost.toml", "lengths.txt"]


def test_every_step_is_checked_whatever_the_solver_says(run, monkeypatch):
    def forgetful(lengths, costs, *, time_limit):
        step = step_planner.plan_step(lengths, costs, time_limit=time_limit)
        return replace(step, passes=step.passes[:-1])

    monkeypatch.setattr(assemble, "plan_step", forgetful)
    assert "every sequence is trained exactly once" in sentence(run())


def test_an_old_plan_stays_when_planning_fails(run, files):
    (files / "plan.json").write_text("old")
    (files / "lengths.txt").write_text("9999\n")
    sentence(run("-o", str(files / "plan.json")))
    assert (files / "plan.json").read_text() == "old"


def command(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=150, check=False, **options)


def test_plan_never_imports_torch(files):
    flags = f"--cluster {EXAMPLES}/clusters/mixed-3-hosts.toml --model gpt-7b --lengths lengths.txt -o p.json".split()
    code = (
        "import sys; from heteromesh.runtime.cli.main import main; "
        f"codes = main(['plan'] + {flags!r}), main(['explain', 'p.json']); "
        "print(codes, 'torch' in sys.modules, 'rich' in sys.modules)"
    )
    done = command("-c", code, cwd=files)
    assert done.stdout.splitlines()[-1] == "(0, 0) False False", done.stderr


def test_module_command_and_exit_codes(files):
    flags = ["plan", "--cluster", "cluster.toml", "--model", "gpt-7b", "--lengths", "lengths.txt"]
    done = command("-m", "heteromesh", *flags, "--cost", "none.toml", cwd=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "heteromesh: error: cost file none.toml does not exist: check the path\n"
    done = command("-m", "heteromesh", "--version")
    assert (done.returncode, done.stdout) == (0, "heteromesh 0.1.0\n")


def test_a_closed_pipe_is_quiet(files):
    flags = "--cluster cluster.toml --model gpt-7b --lengths lengths.txt --cost cost.toml --json"
    script = f"{sys.executable} -m heteromesh plan {flags} | true"
    done = subprocess.run(["sh", "-c", script], cwd=files, capture_output=True, text=True, timeout=150, check=False)
    assert done.stderr == ""


def test_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("run", "plan", "explain", "doctor"))
    assert main([]) == 2
    capsys.readouterr()
    assert main(["plann"]) == 2
    assert "'plann' is not a command (did you mean plan?)" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0
    assert "--batch-tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt(), 130, ""), (RuntimeError("boom"), 1, "RuntimeError: boom"), (SystemExit(3), 3, "")],
)
def test_exceptions_become_exit_codes(monkeypatch, capsys, error, code, words):
    def broken(argv):
        raise error

    monkeypatch.setattr(plan, "main", broken)
    assert main(["plan"]) == code
    err = capsys.readouterr().err
    assert words in err
    assert ("Traceback" in err) == (code == 1)


def test_activations_that_wait_in_host_memory_do_not_count_as_the_devices(files):
    cluster, model = load_cluster(files / "cluster.toml"), load_model("gpt-7b")
    problem = assemble.build_problem(cluster, model, load_constants(files / "cost.toml"), Fixes())
    problem = replace(problem, costs=replace(problem.costs, offload_seconds=(1e-6,) * 4, offload_share=0.5))
    plan = assemble.make_plan(problem, [[6000]], time_limit=0.2)
    assert max(assemble.peak_tokens(plan.steps, 4)) >= 1500
    assert "is fullest: activations of 1000 tokens where 1000 fit (100%)" in plan_text(plan, problem, "")


MEASURED = """
[measured]
seconds_per_token2 = 1e-9
seconds_per_token = 1e-4
seconds_per_pass = 0.05
bytes_per_token = 0
tokens_per_device = 1000
model = { name = "small", parameters = 5, layers = 1, heads = 4, kv_heads = 4, head_dim = 8 }
"""


def test_measured_constants_of_another_model_are_told_and_not_used(run, files):
    cluster = files / "measured.toml"
    cluster.write_text(CLUSTER + MEASURED)
    mine = files / "mine.toml"
    mine.write_text("num_hidden_layers = 2\nhidden_size = 64\nnum_attention_heads = 4\nvocab_size = 100\n")
    code, out, err = run("--json", cost=None, cluster=cluster, model=mine)
    assert code == 0
    assert json.loads(out)["layout"]["cost_source"] == "analytic"
    (line,) = err.splitlines()
    assert "measured.toml are of a model of another shape, small: the costs are analytic" in line
    assert f"`heteromesh probe --model {mine}`" in line
    assert run(cluster=cluster)[2] == "", "with a cost file neither would be used"


def test_terminal_gets_emphasis_and_no_color_does_not(monkeypatch, capsys):
    from heteromesh.runtime.cli import terminal

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.say("Plan: done\n   1  2")
    coloured = capsys.readouterr().out
    assert "\x1b[1mPlan\x1b[0m: done" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.say("Plan: done")
    assert capsys.readouterr().out == "Plan: done\n"
