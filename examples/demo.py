"""Trains on unequal ranks, against the static layouts, then through the death of a rank. About two minutes.

python examples/demo.py [--ranks 2] [--run-dir runs/demo]

Every second rank has half the speed: with root each rank is a host of a sandbox (`heteromesh sandbox`), without it is
paced (pace.py). The data are the functions and classes of Python's own
sources: most are short, a few are a hundred times as long. The first run trains and then times the same batches under
the plans and under even data and even sequence parallel. The second continues it with fault tolerance, and one rank is
killed in a step. The screen at the end has what happened.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pace import pace

import heteromesh as hm
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import TokenStore, open_tokens
from heteromesh.runtime.sandbox import why_not
from llama import Llama, LlamaConfig

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heteromesh"
BATCH_TOKENS = 12_288
MAX_LENGTH = 8_192
STEPS, LAST_STEP, KILLED_AFTER = 8, 26, 11
COMPARED = STEPS
SLOW = 0.5
SECRET = secrets.token_hex(16)
HOST = """
[[hosts]]
names = ["{name}"]
device = "{device}"
count = 1
nics = [{{ kind = "ethernet", gbit = 5 }}]
"""
DEVICE = """
[devices.{name}]
tflops = {tflops}
memory_gb = 4
memory_gbps = 10
link_gbps = 5
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    parser.add_argument("--worker", choices=("compare", "survive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
    else:
        sys.exit(demonstrate(options))


def demonstrate(options: argparse.Namespace) -> int:
    """Runs both parts; returns the exit code."""
    store = load()
    lengths, hosts = sorted(store.lengths.tolist()), sandbox(options)
    where = ", each a host of a sandbox" if hosts else ""
    print(
        f"{len(lengths):,} sequences: median {int(statistics.median(lengths)):,} tokens, 99 of 100 up to "
        f"{lengths[len(lengths) * 99 // 100]:,}, longest {lengths[-1]:,}; {options.ranks} CPU ranks{where}, "
        f"every second one at {SLOW:g} of the speed\n\nPart 1: planned steps, then the same batches in even layouts",
        flush=True,
    )
    code = run(options, hosts, "compare")
    if code == 0:
        print("\nPart 2: the same run goes on with fault tolerance, and a rank is killed", flush=True)
        code = run(options, hosts, "survive", "--fault-tolerance", "--max-restarts", "1")
    if code == 0:
        print("\n" + closing_screen(options.run_dir, options.ranks))
    return code


def run(options: argparse.Namespace, hosts: list[str], part: str, *flags: str) -> int:
    """Returns the exit code of a part. Ctrl-C reaches it too, as it is in this process's group."""
    ranks = [] if hosts else ["--nproc-per-node", str(options.ranks)]
    command = [*hosts, sys.executable, "-m", "heteromesh", "run", *flags, *ranks, __file__]
    command += ["--worker", part, "--run-dir", str(options.run_dir)]
    # hosts prove to each other that they are of this job
    process = subprocess.Popen(command, env={"HETEROMESH_SECRET": SECRET, **os.environ, "OMP_NUM_THREADS": "1"})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def sandbox(options: argparse.Namespace) -> list[str]:
    """Returns the words that run a command on a sandbox's hosts, one a rank; none where there can be no sandbox."""
    file = CACHE / f"demo-{options.ranks}.toml"
    devices = [DEVICE.format(name=name, tflops=tflops) for name, tflops in (("fast", 0.04), ("slow", 0.04 * SLOW))]
    kinds = [("fast", "slow")[i % 2] for i in range(options.ranks)]
    hosts = [HOST.format(name=f"{kind}{i // 2}", device=kind) for i, kind in enumerate(kinds)]
    file.write_text("".join([*devices, *hosts]))
    cores = min(0.9 * (os.cpu_count() or 1), options.ranks * (1 + SLOW) / 2)
    words = [sys.executable, "-m", "heteromesh", "sandbox", "--raw", "--cores", str(cores), str(file), "--"]
    # root in a container may lack the right to make networks
    return [] if why_not() or subprocess.run([*words, "true"], capture_output=True).returncode else words


def load() -> TokenStore:
    """Returns the token store of the definitions, made where it is missing."""
    return open_tokens(open_corpus(definitions(CACHE)), load_tokenizer(), max_length=MAX_LENGTH, cache_dir=CACHE)


def definitions(folder: Path) -> Path:
    """Returns a file with the functions and classes of Python's own sources, one a line, made where it is missing."""
    path = folder / f"definitions-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        with part.open("w") as file:
            for text in open_corpus().read():
                for found in top_level(text):
                    file.write(json.dumps({"text": found}) + "\n")
        part.replace(path)
    return path


def top_level(source: str) -> list[str]:
    """Returns the source of each function and class of a module; nothing of one that does not parse."""
    try:
        found = ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
    lines = source.splitlines(keepends=True)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return ["".join(lines[node.lineno - 1 : node.end_lineno]) for node in found if isinstance(node, kinds)]


def worker(options: argparse.Namespace) -> None:
    own_host = "HETEROMESH_HOST" in os.environ
    index = int(os.environ["NODE_RANK" if own_host else "LOCAL_RANK"])
    if not own_host:  # a sandbox's hosts have their speeds
        pace(SLOW if index % 2 else 1.0)
    store, survive = load(), options.worker == "survive"
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=store.vocab_size, layers=2, hidden=128, heads=4, kv_heads=2, intermediate=352))
    config = hm.TrainerConfig(
        batch_tokens=BATCH_TOKENS,
        max_steps=LAST_STEP if survive else STEPS,
        run_dir=str(options.run_dir),
        learning_rate=3e-3,
        resume=survive,
        fault_tolerance=survive,
        compare_batches=0 if survive else COMPARED,
    )
    hooks = [Death(options.run_dir / "killed.json")] if survive and index == options.ranks - 1 else []
    report = hm.Trainer(model, None, store, config, hooks=hooks).fit()
    if index == 0 and report.comparisons:
        (options.run_dir / "comparisons.json").write_text(json.dumps([asdict(found) for found in report.comparisons]))


class Death(hm.Hook):
    """Kills this process in the middle of a step, once a run."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def step_committed(self, step: hm.StepCommitted) -> None:
        if step.metrics.step >= KILLED_AFTER and not self._mark.exists():
            next_step = step.metrics.step + 1
            self._mark.write_text(json.dumps({"step": next_step, "member": step.world.names[step.world.rank]}))
            threading.Timer(step.metrics.measured_seconds / 2, os.kill, (os.getpid(), signal.SIGKILL)).start()


def closing_screen(folder: Path, ranks: int) -> str:
    """Says what happened, out of the run's own files."""
    metrics = rows(folder / "metrics.jsonl")
    lines = ["What happened", "-------------"]
    for found in json.loads((folder / "comparisons.json").read_text()):
        ratios, apart = found["ratios"], found["largest_loss_difference"]
        equal = f"equal to {apart:.0e}" if apart else "equal"
        lines.append(
            f"planned against {found['layout']}: {found['ratio']:.2f}x as fast on the same {len(ratios)} batches "
            f"({min(ratios):.2f}x to {max(ratios):.2f}x), losses {equal}"
        )
    off = [abs(m["predicted_seconds"] / m["measured_seconds"] - 1) for m in metrics[1:STEPS]]
    lines.append(f"step seconds were predicted to within {statistics.median(off):.0%} (median of {len(off)} steps)")
    lines += survived(folder, ranks)
    lines.append(f"loss {metrics[0]['loss']:.3f} -> {metrics[-1]['loss']:.3f} in {len(metrics)} steps")
    lines.append(f"more: heteromesh explain {folder}; heteromesh report {folder}")
    return "\n".join(lines)


def survived(folder: Path, ranks: int) -> list[str]:
    """Returns what became of the death, by the ledger of who trained what."""
    killed = json.loads((folder / "killed.json").read_text())
    ledger, sequences = rows(folder / "ledger.jsonl"), 0
    for row in ledger:
        trained = sorted(place for places in row["trained"].values() for place in places)
        assert trained == list(range(len(trained))), f"step {row['step']} trained {trained}"
        sequences += len(trained)
    together = {row["step"]: {m for members in row["trained"] for m in members.split("+")} for row in ledger}
    back = next((s for s, members in together.items() if s > killed["step"] and len(members) == ranks), None)
    return [
        f"a rank ({killed['member']}) was killed in step {killed['step']}: the others did all of it and went on, "
        + (f"and it was back in step {back}" if back else "and the run ended before it was back"),
        f"each of the {sequences:,} sequences of these {len(ledger)} steps was trained once",
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
