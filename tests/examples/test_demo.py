"""The parts of the demo that need no ranks: its data, its pacing and what it says at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import pace
import pytest

SOURCE = "import os\n\ndef first(a):\n    return a\n\nx = 1\n\n@decorated\nclass Second:\n    def inner(self): ...\n"
WORK = """
import sys, time
sys.path.insert(0, sys.argv[1])
import pace
pace.pace(float(sys.argv[2]))
time.sleep(0.3)
start, cpu = time.monotonic(), time.process_time()
while time.monotonic() < start + 2:
    pass
print((time.process_time() - cpu) / (time.monotonic() - start))
"""


def test_documents_are_top_level_functions_and_classes() -> None:
    assert demo.top_level(SOURCE) == [
        "def first(a):\n    return a\n",
        "class Second:\n    def inner(self): ...\n",
    ]
    assert demo.top_level("print 'an old one'") == []


def test_a_paced_process_never_runs_more_than_its_share() -> None:
    # a busy machine may let it run less
    share = subprocess.check_output([sys.executable, "-c", WORK, str(Path(pace.__file__).parent), "0.25"], timeout=150)
    assert 0.02 < float(share) < 0.45


def test_pacing_ends_with_the_process_even_if_that_is_killed() -> None:
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); import pace; pace.pace(0.5); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(Path(pace.__file__).parent)])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        paced = _eventually(lambda: children.read_text().split())
    finally:
        process.kill()
        process.wait()
    _eventually(lambda: not _runs(paced[0]))


def _runs(process: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _eventually(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, trained: list[dict[str, list[int]]]) -> None:
    first = demo.STEPS + 1
    seconds = {"predicted_seconds": 1.1, "measured_seconds": 1.0}
    write(folder / "metrics.jsonl", [{"loss": 5.5 - step / 10, **seconds} for step in range(demo.LAST_STEP)])
    write(folder / "ledger.jsonl", [{"step": first + i, "trained": row} for i, row in enumerate(trained)])
    (folder / "killed.json").write_text(json.dumps({"step": demo.KILLED_AFTER + 1, "member": "host:1"}))
    compared = {"layout": "static data parallel", "ratios": [1.4, 1.6], "ratio": 1.5, "largest_loss_difference": 2e-7}
    (folder / "comparisons.json").write_text(json.dumps([compared]))


def test_the_closing_screen_says_what_happened(tmp_path: Path) -> None:
    both, one = {"0": [0, 2], "1": [1]}, {"0": [0, 1, 2]}
    make_run(tmp_path, [both, both, both, one, one, both])
    text = demo.closing_screen(tmp_path, 2)
    assert "planned against static data parallel: 1.50x as fast on the same 2 batches (1.40x to 1.60x)" in text
    assert "losses equal to 2e-07" in text
    assert "a rank (host:1) was killed in step 12" in text
    assert "it was back in step 14" in text
    assert "each of the 18 sequences" in text
    assert "predicted to within 10%" in text


def test_a_sequence_trained_twice_is_no_success(tmp_path: Path) -> None:
    make_run(tmp_path, [{"0": [0, 1], "1": [1]}])
    with pytest.raises(AssertionError, match="step 9"):
        demo.closing_screen(tmp_path, 2)
