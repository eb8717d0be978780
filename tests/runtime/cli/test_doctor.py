import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from heteromesh.runtime.cli import doctor
from heteromesh.runtime.cli.main import main


def replace_checks(monkeypatch, **checks):
    monkeypatch.setattr(doctor, "CHECKS", tuple(checks.items()))


def raiser(error):
    def check():
        raise error

    return check


@pytest.mark.alone
def test_everything_here_works(capsys):
    """The real checks, on this machine."""
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    states = {check["check"]: check["status"] for check in report["checks"]}
    needed = ("python", "solver", "planner", "torch", "attention", "loopback", "files", "extras")
    assert {name: states[name] for name in needed} == dict.fromkeys(needed, "ok"), report
    assert states["nvidia"] in ("ok", "warn")
    assert (code, report["ok"]) == (0, True)
    text = json.dumps(report)
    assert socket.gethostname() not in text
    assert not re.search(r"(?<![\w.])/(?:[\w.]+/)+", text), "a path of this machine"


def test_exit_code_and_lines_follow_the_worst_finding(monkeypatch, capsys):
    replace_checks(monkeypatch, fine=lambda: "good", odd=raiser(doctor.Doubtful("slow disk")))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok    fine  good\nwarn  odd   slow disk\n"
    replace_checks(monkeypatch, fine=lambda: "good", bad=raiser(doctor.Broken("no disk")))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "ok    fine  good\nfail  bad   no disk\n"


def test_a_check_that_raises_is_a_finding_without_its_message():
    finding = doctor.run_check("odd", raiser(OSError("/home/someone/secret")))
    assert (finding.status, finding.detail) == ("fail", "raised OSError")


def test_solver_check_looks_at_the_answer(monkeypatch):
    import pulp

    monkeypatch.setattr(pulp.LpProblem, "solve", lambda self, solver: None)
    with pytest.raises(doctor.Broken, match=r"HiGHS chose \[0, 0, 0\]"):
        doctor.check_solver()


def test_attention_check_looks_at_the_numbers(monkeypatch):
    from heteromesh.parallel.attention import api

    right = api.attention
    monkeypatch.setattr(api, "attention", lambda q, k, v: right(q, k, v) * 1.01)
    with pytest.raises(doctor.Broken, match="differs from the plain formula"):
        doctor.check_attention()


def test_loopback_check_looks_at_the_sum(monkeypatch):
    start = subprocess.Popen

    def popen(command, **options):
        return start([sys.executable, "-c", "print(2.0)"], **options)

    monkeypatch.setattr(doctor.subprocess, "Popen", popen)
    with pytest.raises(doctor.Broken, match=r"summed 1 and 2 to \['2.0', '2.0'\]"):
        doctor.check_loopback()


def test_loopback_check_ends_in_time_and_leaves_no_process(monkeypatch):
    start, started = subprocess.Popen, []

    def popen(command, **options):
        started.append(start([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[-1]

    monkeypatch.setattr(doctor.subprocess, "Popen", popen)
    monkeypatch.setattr(doctor, "LOOPBACK_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(doctor.Broken, match="did not finish"):
        doctor.check_loopback()
    assert time.monotonic() - began < 250
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_files_check_needs_a_writable_place(monkeypatch):
    def refuse():
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    with pytest.raises(doctor.Broken, match=r"No space left on device.: set TMPDIR"):
        doctor.check_files()


def test_nvidia_check_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(doctor.Doubtful, match="nvidia-ml-py is not installed"):
        doctor.check_nvidia()
