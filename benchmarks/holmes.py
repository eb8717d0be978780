"""Holmes' published ratios (arXiv 2312.03549), from the pipeline simulator with three calibrated constants.

    python benchmarks/holmes.py [--samples 768] [--json]

3.6 B parameters (30 layers of width 3072, sequences of 2048), 4, 6 and 8 hosts of 8 A100, two stages of half of the
hosts each, no tensor parallel, micro-batches of 4 samples. The samples of a step are not known here: 768 is assumed.
Published are samples per second with all hosts on InfiniBand, all on Ethernet, and hybrid: stage 0 on InfiniBand,
stage 1 on RoCE, Ethernet between.
Calibrated, each on one cell of 4 hosts: the device's rate (InfiniBand), the rate of a host's Ethernet (Ethernet), the
rate between the two fabrics (hybrid). All else is predicted. A second table adds one constant more, see the results.
The last part: stage splits under Holmes' own speeds, and what our program chooses for the hybrid cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from heteromesh.planner.stages.hosts import ClusterResources, HostResources
from heteromesh.planner.stages.placement import place
from heteromesh.planner.stages.predict import predict
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.planner.stages.workload import Workload

MICRO_BATCH, LENGTH, HIDDEN, LAYERS, VOCABULARY = 4, 2048, 3072, 30, 51_200
DEVICES = 8
SIZES = (4, 6, 8)
PUBLISHED = {
    "InfiniBand": (99.23, 142.09, 148.88),
    "RoCE": (80.54, 114.15, 145.64),
    "Ethernet": (61.32, 74.98, 83.38),
    "hybrid": (74.91, 97.84, 112.46),
}
"""Samples per second by number of hosts; from memory of the paper's main table, its arithmetic is consistent."""
RATIOS = (
    ("hybrid / InfiniBand", "hybrid", "InfiniBand", (0.756, 0.686, 0.757)),
    ("Ethernet / InfiniBand", "Ethernet", "InfiniBand", (0.62, 0.53, 0.56)),
    ("hybrid / Ethernet", "hybrid", "Ethernet", (1.22, 1.30, 1.35)),
)
RDMA = 200e9 / 8 * 0.75
"""Bytes per second of a host's InfiniBand or RoCE: 200 Gbit/s at planner.links' utilisation, not calibrated."""
SHIPPED = {30: (16, 14), 48: (26, 22)}
"""Layers of the two stages in Holmes' scripts."""
SPEEDS = (197.0, 160.0)
"""TFLOP/s per device that Holmes measured on InfiniBand and on RoCE, and splits layers by."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is calibrated."""

    samples: int
    """Of a step; given, not calibrated."""
    tflops: float = 200.0
    """Of a device."""
    ethernet: float = 2e9
    """Bytes per second each way of a host's Ethernet."""
    uplink: float = 4e9
    """Bytes per second each way between the two fabrics of a hybrid cluster, all hosts together."""
    infiniband_at_8: float = RDMA
    """Bytes per second of a host's InfiniBand where the fabric has 8 hosts."""


def work(constants: Constants) -> Workload:
    """A step. Operations with recomputing, as the paper counts them: 96 s l h^2 (1 + s / 6h + V / 16lh) a sample."""
    unit = 96 * LENGTH * HIDDEN**2 / (constants.tflops * 1e12) * MICRO_BATCH
    tokens = MICRO_BATCH * LENGTH
    return Workload(
        layers=LAYERS,
        micro_batches=constants.samples // MICRO_BATCH,
        micro_batch_tokens=tokens,
        layer_seconds=unit * (1 + LENGTH / (6 * HIDDEN)),
        head_seconds=unit * VOCABULARY / (16 * HIDDEN),
        boundary_bytes=2 * tokens * HIDDEN,
        layer_parameters=12 * HIDDEN**2,
        embedding_parameters=VOCABULARY * HIDDEN,
        head_parameters=VOCABULARY * HIDDEN,
        layer_activation_bytes=2 * tokens * HIDDEN,
        head_activation_bytes=6 * tokens * VOCABULARY,
        # Megatron's distributed optimizer: reduce-scatter of fp32 gradients, all-gather of bf16 parameters
        gradient_bytes=(4 + 2) / 2,
    )


def cluster(kind: str, hosts: int, constants: Constants) -> ClusterResources:
    """The first half of the hosts is stage 0."""
    rdma = constants.infiniband_at_8 if kind == "InfiniBand" and hosts == 8 else RDMA
    fabrics = {"InfiniBand": ("ib", "ib"), "RoCE": ("roce", "roce"), "Ethernet": ("", ""), "hybrid": ("ib", "roce")}

    def host(index: int) -> HostResources:
        return HostResources(
            ranks=tuple(range(DEVICES * index, DEVICES * (index + 1))),
            speeds=(1.0,) * DEVICES,
            memory=72e9,
            memory_rate=2039e9,
            link=90e9,
            fabric=fabrics[kind][index >= hosts // 2],
            rdma=rdma,
            ethernet=constants.ethernet,
        )

    return ClusterResources(
        hosts=tuple(map(host, range(hosts))), uplink=constants.uplink if kind == "hybrid" else math.inf
    )


def layout(hosts: int, layers: tuple[int, int], samples: int) -> Placement:
    """Two stages of half of the hosts."""
    ranks, half = range(DEVICES * hosts), DEVICES * hosts // 2
    stages = (Stage(ranks=tuple(ranks[:half]), layers=layers[0]), Stage(ranks=tuple(ranks[half:]), layers=layers[1]))
    return Placement(stages=stages, micro_batches=(samples // MICRO_BATCH // half,) * half)


def throughput(kind: str, hosts: int, constants: Constants) -> float:
    """Samples per second. Even stages, or Holmes' own split on the hybrid cluster."""
    layers = SHIPPED[LAYERS] if kind == "hybrid" else (LAYERS // 2, LAYERS // 2)
    placement = layout(hosts, layers, constants.samples)
    return constants.samples / predict(placement, cluster(kind, hosts, constants), work(constants)).seconds


def solve(measure: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a growing function reaches the target, by bisection."""
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    return math.sqrt(low * high)


def calibrate(samples: int) -> Constants:
    """Each constant on one cell of 4 hosts."""
    c = Constants(samples=samples)
    c = replace(c, tflops=_fit("InfiniBand", 4, c, "tflops", 50, 1000))
    c = replace(c, ethernet=_fit("Ethernet", 4, c, "ethernet", 1e8, 1e11))
    return replace(c, uplink=_fit("hybrid", 4, c, "uplink", 1e8, 1e11))


def _fit(kind: str, hosts: int, constants: Constants, name: str, low: float, high: float) -> float:
    target = PUBLISHED[kind][SIZES.index(hosts)]
    return solve(lambda v: throughput(kind, hosts, replace(constants, **{name: v})), target, low, high)


def table(constants: Constants) -> dict[str, Any]:
    """Every published number beside ours."""
    ours = {kind: [throughput(kind, n, constants) for n in SIZES] for kind in PUBLISHED}
    ratios = [
        {"ratio": name, "hosts": n, "published": published[i], "ours": ours[a][i] / ours[b][i]}
        for name, a, b, published in RATIOS
        for i, n in enumerate(SIZES)
    ]
    return {"samples_per_second": ours, "ratios": ratios}


def splits() -> list[dict[str, Any]]:
    """Holmes' speeds, no network, many micro-batches: the split of our program beside the shipped one."""
    found = []
    for layers, shipped in SHIPPED.items():
        w = replace(work(Constants(samples=768)), layers=layers, head_seconds=0.0, boundary_bytes=0.0)
        w = replace(w, layer_parameters=1, embedding_parameters=0, head_parameters=0, micro_batches=128 * DEVICES)
        hosts = [
            replace(cluster("hybrid", 2, Constants(samples=768)).hosts[i], speeds=(v / SPEEDS[0],) * DEVICES)
            for i, v in enumerate(SPEEDS)
        ]
        sites = ClusterResources(hosts=tuple(hosts))
        decision = place(sites, [w], tensor_parallel=(1,))
        chosen = next(c for c in decision.candidates if c.family == "pipeline across fabrics")
        assert chosen.placement
        by_host = {stage.ranks[0] // DEVICES: stage.layers for stage in chosen.placement.stages}
        held = replace(layout(2, shipped, 768), micro_batches=chosen.placement.micro_batches)
        found.append(
            {
                "layers": layers,
                "shipped": shipped,
                "ours": (by_host[0], by_host[1]),
                "speedup": predict(held, sites, w).seconds / chosen.seconds,
                "gap": chosen.gap,
            }
        )
    return found


def choices(constants: Constants) -> list[dict[str, Any]]:
    """What our program does with the hybrid cluster."""
    found = []
    for n in SIZES:
        sites, w = cluster("hybrid", n, constants), work(constants)
        decision = place(sites, [w], tensor_parallel=(1,), time_limit=20)
        holmes = predict(layout(n, SHIPPED[LAYERS], constants.samples), sites, w).seconds
        for c in decision.candidates:
            layers = [s.layers for s in c.placement.stages] if c.placement else []
            found.append(
                {"hosts": n, "family": c.family, "layers": layers, "speedup": holmes / c.seconds, "gap": c.gap}
            )
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", type=int, default=768, help="of a step; a multiple of 384 deals out evenly")
    args = parser.parse_args()
    if args.samples < 1 or args.samples % 384:
        raise SystemExit(f"--samples {args.samples} must be a multiple of 384: 16, 24 and 32 pipelines get equal parts")
    c = calibrate(args.samples)
    more = replace(c, infiniband_at_8=_fit("InfiniBand", 8, c, "infiniband_at_8", 1e8, 1e11))
    result = {"constants": vars(more), "three": table(c), "four": table(more)}
    result |= {"splits": splits(), "choices": choices(c)}
    print(json.dumps(result) if args.json else text(result))


def text(result: dict[str, Any]) -> str:
    """All tables."""
    c = result["constants"]
    lines = [
        f"calibrated: {c['tflops']:.0f} TFLOP/s a device, Ethernet {c['ethernet'] / 1e9:.2f} GB/s a host, "
        f"{c['uplink'] / 1e9:.2f} GB/s between the fabrics",
        f"the fourth: InfiniBand {c['infiniband_at_8'] / 1e9:.2f} GB/s a host of 8 (else {RDMA / 1e9:.2f})",
    ]
    for name in ("three", "four"):
        lines += ["", f"with {name} constants     hosts  published   ours    off"]
        for r in result[name]["ratios"]:
            off = r["ours"] / r["published"] - 1
            lines.append(f"{r['ratio']:24}{r['hosts']:5}{r['published']:11.3f}{r['ours']:7.3f}{off:+7.1%}")
        lines.append("samples/s, published and ours")
        for kind, values in result[name]["samples_per_second"].items():
            cells = zip(SIZES, PUBLISHED[kind], values, strict=True)
            shown = "   ".join(f"{n} hosts {p:.1f} {v:.1f} ({v / p - 1:+.0%})" for n, p, v in cells)
            lines.append(f"{kind:12}{shown}")
    lines.append("")
    for r in result["splits"]:
        lines.append(
            f"{r['layers']} layers, speeds {SPEEDS}: shipped {r['shipped']}, ours {r['ours']}, "
            f"{r['speedup']:.4f}x as fast, gap {r['gap']:.2%}"
        )
    lines.append("")
    for r in result["choices"]:
        lines.append(
            f"hybrid, {r['hosts']} hosts, {r['family']}: layers {r['layers']}, {r['speedup']:.3f}x Holmes' layout, "
            f"gap {r['gap']:.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
