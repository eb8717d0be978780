"""What a probe found as text and as one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.report.tables import table
from heteromesh.runtime.probe.findings import Findings
from heteromesh.runtime.probe.model.costs import ModelCosts


def report_text(
    findings: Findings, sentences: tuple[str, ...], cluster: Cluster, costs: ModelCosts | None, seconds: float
) -> str:
    """Writes the report for people. sentences: the outliers."""
    blocks = [
        f"Cluster  {cluster.name}: {cluster.ranks} ranks on {len(cluster.hosts)} hosts, probed in {seconds:.1f} s",
        _ranks(findings, cluster),
        *_hosts(findings),
        *([_model(costs)] if costs else []),
        "Outliers: " + ("none" if not sentences else "\n" + "\n".join(f"  {s}" for s in sentences)),
    ]
    return "\n\n".join(blocks)


def report_json(
    findings: Findings, sentences: tuple[str, ...], cluster: Cluster, costs: ModelCosts | None, seconds: float
) -> dict[str, Any]:
    """Returns everything. Bytes, seconds, bytes per second unless the name has another unit."""
    return {
        "cluster": cluster.name,
        "seconds": seconds,
        "outliers": list(sentences),
        "ranks": [
            {"rank": r, "speed": cluster.measured.speeds[r], **asdict(f), **asdict(c)}
            for r, (f, c) in enumerate(zip(findings.facts, findings.compute, strict=True))
        ],
        "network": asdict(findings.network) | {"names": findings.names},
        "cards": [asdict(card) for card in findings.cards],
        "measured": asdict(cluster.measured),
        "timed": None if costs is None else {"layers": costs.layers, "tokens": costs.tokens},
    }


def _ranks(findings: Findings, cluster: Cluster) -> str:
    rows = []
    for rank, (f, c) in enumerate(zip(findings.facts, findings.compute, strict=True)):
        rows.append(
            (
                str(rank),
                findings.names[findings.host_of(rank)],
                cluster.device_name(rank),
                f"{c.tflops['bf16']:.3g}",
                f"{c.tflops['fp32']:.3g}",
                f"{c.memory_gbps:.3g}",
                f"{f.memory_bytes / 1e9:.3g}",
                f"{c.busy_cores:.2g} of {f.cores:.3g}",
                f"{cluster.measured.speeds[rank]:.3g}",
                f"{f.nvidia.sm_mhz} MHz, PCIe {f.nvidia.pcie}, {f.nvidia.nvlinks} NVLinks" if f.nvidia else "",
            )
        )
    heads = (
        "rank",
        "<host",
        "<device",
        "bf16 TFLOP/s",
        "fp32 TFLOP/s",
        "memory GB/s",
        "GB",
        "cores used",
        "speed",
        "<",
    )
    return table(heads, rows)


def _hosts(findings: Findings) -> list[str]:
    network, names = findings.network, findings.names
    blocks = []
    if network.between:
        links = {p.hosts: p for p in network.between}
        rows = []
        for a, name in enumerate(names):
            cells = [
                "-" if a == b else f"{links[min(a, b), max(a, b)].both * 8e-9:.3g}/{_micro(links, a, b)}"
                for b in range(len(names))
            ]
            rows.append((name, f"{network.out[a] * 8e-9:.3g}", f"{network.into[a] * 8e-9:.3g}", *cells))
        fits = [p.line.r2 for p in network.between]
        blocks.append(
            "Links between hosts, Gbit/s each way (both at once) / microseconds; "
            f"r2 of the fits {min(fits):.4f} to {max(fits):.4f}\n" + table(("<host", "out", "into", *names), rows)
        )
    if network.together is not None:
        verdict = "full bisection" if network.together >= 0.8 else "the network between hosts is shared"
        blocks.append(f"All hosts at once: {network.together:.2f} of the rates of pairs alone ({verdict})")
    if findings.cards:
        rows = [(names[c.host], c.interface, f"{c.out * 8e-9:.3g}", f"{c.into * 8e-9:.3g}") for c in findings.cards]
        blocks.append("Network cards, by plain TCP\n" + table(("<host", "<card", "out Gbit/s", "into Gbit/s"), rows))
    for host, ranks in enumerate(network.hosts):
        pairs = [p for p in network.local if p.ranks[0] in ranks]
        if pairs:
            slow = min(pairs, key=lambda p: p.both)
            blocks.append(
                f"Inside {names[host]}: {findings.link(host) / 1e9:.3g} GB/s each way between two ranks (median), "
                f"slowest {slow.both / 1e9:.3g} (ranks {slow.ranks[0]} and {slow.ranks[1]}), "
                f"{1e6 * max(p.latency for p in pairs):.0f} microseconds at most"
            )
    return blocks


def _micro(links: dict[tuple[int, int], Any], a: int, b: int) -> str:
    return f"{links[min(a, b), max(a, b)].latency * 1e6:.0f}"


def _model(found: ModelCosts) -> str:
    c = found.costs
    how = f"{found.layers[0]} layers" if len(found.layers) == 1 else f"{found.layers[0]} and {found.layers[1]} layers"
    works = ", ".join(f"{m.name} {m.work:.2f}" for m in c.methods)
    return (
        f"Model {found.model.name} ({how} timed on up to {found.tokens} tokens, {found.model.dtype}): "
        f"{c.seconds_per_token:.3g} s a token, {c.seconds_per_token2:.3g} s a squared token, "
        f"{c.seconds_per_pass:.3g} s a pass, {c.seconds_per_split_pass:.3g} s more where split, "
        f"{c.seconds_per_step:.3g} s a step" + (f"; compute of split passes: {works}" if works else "")
    )
