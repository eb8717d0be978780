"""Models that an even share doesn't fit: trained in limited memory on unequal ranks, and compared with one process.

    python benchmarks/memory_models.py [--kinds llama,tied,lora,moe] [--hosts 2] [--steps 3]

Root on Linux (docs/sandbox.md). Each model begins on the meta device. It is trained by one process without limits; in
the sandbox by one large and one or more small hosts with limits (`heteromesh sandbox --limit-memory`), as planned; and
by the same hosts with even shares, as if all had the same memory, which the small ones don't survive. Reported are how
far losses and all parameters of the last checkpoint are from the one process's, and each rank's peak beside the plan's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import heteromesh as hm
from heteromesh.parallel.transformers import register
from heteromesh.planner.cluster.catalog import Device
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.planner.cluster.files import cluster_toml

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from llama import Llama, LlamaConfig

VOCABULARY, HIDDEN, LAYERS = 4096, 512, 8
LARGE, SMALL = 1.5, 0.72
"""GB. What a rank holds before it has a model, 0.35 to 0.45 GB, is in it."""
CORES = 1.8


def llama() -> nn.Module:
    return Llama(LlamaConfig(vocab=VOCABULARY, layers=LAYERS, hidden=HIDDEN, kv_heads=8, intermediate=4 * HIDDEN))


def tied() -> nn.Module:
    model: Any = llama()
    model.head.weight = model.embed.weight
    return model


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    config = Config(
        vocab_size=VOCABULARY,
        hidden_size=2 * HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=2 * LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        attn_implementation="heteromesh",
    )
    model = LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))


def moe() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN // 2,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=8,
        attn_implementation="heteromesh",
    )
    return MixtralForCausalLM(config)


KINDS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "tied": tied, "lora": lora, "moe": moe}


def work(chosen: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    if chosen.kind in ("lora", "moe"):
        from accelerate import init_empty_weights

        register()
        with init_empty_weights():
            model = KINDS[chosen.kind]()
    else:
        with torch.device("meta"):
            model = KINDS[chosen.kind]()
    source = torch.Generator().manual_seed(1)
    data = [torch.randint(VOCABULARY, (n,), generator=source) for n in (100, 30, 64, 90, 128, 55) * 6]
    trained = [p for p in model.parameters() if p.requires_grad]
    config = hm.TrainerConfig(
        batch_tokens=512,
        max_steps=chosen.steps,
        run_dir=chosen.run_folder,
        cluster=chosen.cluster,
        print_plans=0,
        idle_hosts=False,
    )
    hm.Trainer(model, torch.optim.AdamW(trained, lr=1e-3, eps=1e-4), data, config).fit()


def cluster_of(memory: Sequence[float]) -> Cluster:
    sizes = {f"of{size:g}": Device(tflops=0.02, memory_gb=size, memory_gbps=10, link_gbps=5) for size in memory}
    hosts = tuple(
        Host(name=f"h{i}", device=f"of{size:g}", count=1, nics=(Nic(kind="ethernet", gbit=1),))
        for i, size in enumerate(memory)
    )
    return Cluster(name="memory", hosts=hosts, devices=sizes)


def run(kind: str, folder: Path, steps: int, limits: Cluster | None = None, assumed: Cluster | None = None) -> str:
    """Trains; returns how it ended. assumed: the cluster that the Trainer is told of."""
    words = [sys.executable, __file__, "--kind", kind, "--run-folder", str(folder / "run"), "--steps", str(steps)]
    folder.mkdir()
    if limits is not None and assumed is not None:
        for name, cluster in (("limits", limits), ("assumed", assumed)):
            (folder / f"{name}.toml").write_text(cluster_toml(cluster))
        sandbox = [sys.executable, "-m", "heteromesh", "sandbox", str(folder / "limits.toml"), "--limit-memory"]
        launch = ["--cores", str(CORES), "--", sys.executable, "-m", "torch.distributed.run"]
        words = [*sandbox, *launch, *words[1:], "--cluster", str(folder / "assumed.toml")]
    ended = subprocess.run(
        words, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if not ended.returncode:
        return "trained"
    lines = (ended.stdout + ended.stderr).splitlines()
    refused = [line for line in lines if "does not fit" in line]
    killed = [line for line in lines if "exitcode  : -9" in line]
    return f"refused: {refused[0]}" if refused else "killed: out of memory" if killed else f"failed: {lines[-15:]}"


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Returns the parameters of the last checkpoint."""
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    file = run / "whole.pt"
    dcp_to_torch_save(folder, file)
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["model"]
    return found


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(kind: str, memory: Sequence[float], steps: int, folder: Path) -> None:
    cluster = cluster_of(memory)
    even = cluster_of([sum(memory)] * len(memory))
    ended = run(kind, folder / "one", steps)
    if ended != "trained":
        raise SystemExit(f"{kind}, one process: {ended}")
    told = run(kind, folder / "even", steps, cluster, replace(even, name="even"))
    print(f"{kind}: with even shares: {told}", flush=True)
    told = run(kind, folder / "planned", steps, cluster, cluster)
    if told != "trained":
        print(f"{kind}: as planned: {told}", flush=True)
        return
    one, planned = folder / "one/run", folder / "planned/run"
    worst = max(abs(a - b) / b for a, b in zip(losses(planned), losses(one), strict=True))
    expected, found = weights(one), weights(planned)
    off = max(float((found[n] - p).norm() / p.norm().clamp_min(1e-12)) for n, p in expected.items())
    owned = json.loads((planned / "config.json").read_text()).get("ownership")
    ranks = json.loads((planned / "memory.json").read_text())["ranks"]
    peaks = ", ".join(
        f"{r['measured'] / 1e9:.3f} of {sum(r['predicted'].values()) / 1e9:.3f} GB "
        f"({r['measured'] / sum(r['predicted'].values()) - 1:+.1%})"
        for r in ranks
    )
    shares = "/".join(f"{f:.2f}" for f in owned["fractions"]) if owned else "whole"
    print(f"{kind}: as planned ({shares}): losses within {worst:.1e}, parameters {off:.1e}; peaks {peaks}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--large", type=float, default=LARGE, help="GB of the first host")
    parser.add_argument("--small", type=float, default=SMALL, help="GB of the others")
    for name in ("kind", "run-folder", "cluster"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.kind:
        work(chosen)
        return
    for kind in chosen.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            compare(kind, [chosen.large, *[chosen.small] * (chosen.hosts - 1)], chosen.steps, Path(folder))


if __name__ == "__main__":
    main()
