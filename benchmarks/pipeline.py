"""A pipeline plan for two unlike hosts, trained by `heteromesh run --plan`, beside the equal cut and whole replicas.

    python benchmarks/pipeline.py [--layers 6] [--speed 0.5] [--repeats 3] [--json]

Two hosts in the sandbox (root) on a slow link, with CPU quotas of 1 core and `--speed` cores. `heteromesh plan` makes
the plan; the equal cut is the same plan with equally many layers a stage, the replicas are its steps. Each is trained
in turns, `--repeats` times; a layout's seconds are the median of its steps but for each run's first two. The losses of
all must be those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import heteromesh as hm
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import TokenStore, open_tokens
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama, LlamaConfig

CLUSTER = """
name = "two-speeds"
[devices.fast]
tflops = 0.06
memory_gb = 4
memory_gbps = 10
link_gbps = 5
[devices.slow]
tflops = {slow}
memory_gb = 4
memory_gbps = 10
link_gbps = 5
[[hosts]]
names = ["fast0"]
device = "fast"
count = 1
nics = [{{ kind = "ethernet", gbit = {gbit} }}]
[[hosts]]
names = ["slow0"]
device = "slow"
count = 1
nics = [{{ kind = "ethernet", gbit = {gbit} }}]
"""
MODEL = """
num_hidden_layers = {layers}
hidden_size = {hidden}
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = {intermediate}
vocab_size = {vocab}
"""
WARM = 2
"""Steps of a run that don't count."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--speed", type=float, default=0.5, help="of the second host, relative to the first")
    parser.add_argument("--gbit", type=float, default=0.05, help="of each host's link")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--run-dir", help="train there: what the runs of this benchmark call")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def intermediate(chosen: argparse.Namespace) -> int:
    return -(-chosen.hidden * 8 // 3 // 16) * 16


def open_store(chosen: argparse.Namespace) -> TokenStore:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "heteromesh"
    return open_tokens(open_corpus(), load_tokenizer(), max_length=chosen.max_length, cache_dir=cache)


def train(chosen: argparse.Namespace) -> None:
    store = open_store(chosen)
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab=store.vocab_size,
            layers=chosen.layers,
            hidden=chosen.hidden,
            heads=4,
            kv_heads=2,
            intermediate=intermediate(chosen),
        )
    )
    config = hm.TrainerConfig(
        batch_tokens=chosen.batch_tokens, max_steps=chosen.steps, run_dir=chosen.run_dir, print_plans=0
    )
    hm.Trainer(model, None, store, config).fit()


def write_plans(chosen: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Returns the plan files by what they are called."""
    store = open_store(chosen)
    (folder / "cluster.toml").write_text(CLUSTER.format(slow=0.06 * chosen.speed, gbit=chosen.gbit))
    shape = {"layers": chosen.layers, "hidden": chosen.hidden, "vocab": store.vocab_size}
    (folder / "model.toml").write_text(MODEL.format(**shape, intermediate=intermediate(chosen)))
    batch = Sampler(store.lengths, batch_tokens=chosen.batch_tokens, seed=0).next_batch()
    (folder / "lengths.txt").write_text("\n".join(map(str, batch.lengths)))
    files = [f"--{name}={folder / file}" for name, file in (("cluster", "cluster.toml"), ("model", "model.toml"))]
    files += [f"--lengths={folder / 'lengths.txt'}", f"--batch-tokens={chosen.batch_tokens}"]
    command = [sys.executable, "-m", "heteromesh", "plan", *files, "-o", str(folder / "plan.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["layout"]["trains"] == "stages", "the planner would not train this model in stages"
    stages = plan["layout"]["placement"]["stages"]
    planned = " + ".join(str(stage["layers"]) for stage in stages)
    for index, stage in enumerate(stages):
        stage["layers"] = chosen.layers * (index + 1) // len(stages) - chosen.layers * index // len(stages)
    equal = " + ".join(str(stage["layers"]) for stage in stages)
    (folder / "equal.json").write_text(json.dumps(plan))
    plan["layout"]["trains"] = "steps"
    (folder / "steps.json").write_text(json.dumps(plan))
    return {
        f"planned stages of {planned} layers": folder / "plan.json",
        f"equal cut, {equal}": folder / "equal.json",
        "replicas of the whole model": folder / "steps.json",
    }


def run(chosen: argparse.Namespace, command: list[str], run_dir: Path) -> list[dict[str, float]]:
    """Trains in `run_dir`; returns the metrics of its steps."""
    own = {"layers": chosen.layers, "hidden": chosen.hidden, "steps": chosen.steps, "max-length": chosen.max_length}
    own |= {"batch-tokens": chosen.batch_tokens, "run-dir": run_dir}
    arguments = [f"--{name}={value}" for name, value in own.items()]
    subprocess.run([*command, __file__, *arguments], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    plans, module = write_plans(chosen, folder), [sys.executable, "-m", "heteromesh"]
    alone = [row["loss"] for row in run(chosen, [sys.executable], folder / "alone")]
    cluster = str(folder / "cluster.toml")
    sandbox = [*module, "sandbox", cluster, "--raw", "--cores", str(1 + chosen.speed), "--"]
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(chosen.repeats):
        for number, (name, plan) in enumerate(plans.items()):
            command = [*sandbox, *module, "run", "--cluster", cluster, "--plan", str(plan)]
            rows = run(chosen, command, folder / f"run-{turn}-{number}")
            for row, loss in zip(rows, alone, strict=True):
                assert abs(row["loss"] - loss) < 1e-5 * loss, f"{name}: a loss of {row['loss']} and not {loss}"
            seconds[name] += [row["measured_seconds"] for row in rows[WARM:]]
    return seconds


def show(seconds: dict[str, list[float]], chosen: argparse.Namespace) -> None:
    equal = next(statistics.median(own) for name, own in seconds.items() if name.startswith("equal"))
    for name, own in seconds.items():
        if chosen.json:
            print(json.dumps({"layout": name, "seconds": own}), flush=True)
            continue
        low, middle, high = statistics.quantiles(own, n=4)
        print(f"{name:32} {middle:6.3f} s ({low:.3f} to {high:.3f})  {equal / middle:5.2f}x the equal cut", flush=True)


def main() -> None:
    chosen = options()
    if chosen.run_dir:
        train(chosen)
        return
    with tempfile.TemporaryDirectory() as folder:
        show(measure(chosen, Path(folder)), chosen)


if __name__ == "__main__":
    main()
