"""What `heteromesh probe` starts on every rank."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from heteromesh.comm.world import World, join_world
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster, load_cluster
from heteromesh.planner.cluster.files import cluster_toml
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.files import written_whole
from heteromesh.planner.model.spec import ModelSpec, load_model
from heteromesh.runtime.cli.output import check_writable, writing
from heteromesh.runtime.cli.terminal import say
from heteromesh.runtime.probe.assemble import assemble, with_costs
from heteromesh.runtime.probe.findings import collect, find_outliers
from heteromesh.runtime.probe.model.costs import measure_model
from heteromesh.runtime.probe.report import report_json, report_text

TIMEOUT = timedelta(minutes=2)
"""For the slowest answer of a peer."""
SECONDS = 50.0
"""Of a whole probe, about: a model gets what the rest leaves of it, within limits."""
MODEL_SECONDS = (10.0, 30.0)


def add_flags(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Adds the flags that are probe's own and not torchrun's."""
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="write the cluster file here (on rank 0)")
    add("--model", metavar="M", help="also fit the costs of this model, as `heteromesh plan --model` takes it")
    add("--cluster", type=Path, metavar="OLD", help="take names, device names, fabrics and NIC kinds from this file")
    add("--force", action="store_true", help="replace an existing FILE")
    add("--json", action="store_true", help="print everything as one JSON document")


def check_output(path: Path, force: bool) -> None:
    """Raises UserError where the file can't be written, or exists."""
    check_writable(path)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"-o {path} is in a directory that can't be written to: give another place")
    if path.exists() and not force:
        raise UserError(f"-o {path} exists: give another name, or --force to replace it")


def _write(path: Path, text: str) -> None:
    with writing(path), written_whole(path) as part:
        part.write_text(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one rank of a probe."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    options = parser.parse_args(argv)
    start = time.perf_counter()
    with join_world(TIMEOUT) as world:
        described, spec = world.once(lambda: _read(options))
        text, output = _probe(world, described, spec, options, start)
        world.once(lambda: _write(options.output, text))
    if world.rank == 0:
        print(output) if options.json else say(output)
        print(f"wrote {options.output}", file=sys.stderr)


def _read(options: argparse.Namespace) -> tuple[Cluster | None, ModelSpec | None]:
    check_output(options.output, options.force)
    described = load_cluster(options.cluster) if options.cluster else None
    return described, load_model(options.model) if options.model else None


def _probe(
    world: World, described: Cluster | None, spec: ModelSpec | None, options: argparse.Namespace, start: float
) -> tuple[str, str]:
    """Returns (the file's text, what to print)."""
    findings = collect(world, described)
    cluster = assemble(findings, described, options.output.stem)
    costs = None
    if spec:
        rate = cluster_links(cluster) if world.size > 1 else None
        left = min(max(MODEL_SECONDS), max(min(MODEL_SECONDS), SECONDS - (time.perf_counter() - start)))
        costs = measure_model(world, spec, findings.compute[world.rank].tflops, rate, left)
        cluster = with_costs(cluster, costs)
    sentences, seconds = find_outliers(findings), time.perf_counter() - start
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    comment = "\n".join((f"Measured by `heteromesh probe` on {made} UTC.", *sentences))
    show = report_json if options.json else report_text
    shown = show(findings, sentences, cluster, costs, seconds)
    return cluster_toml(cluster, comment), shown if isinstance(shown, str) else json.dumps(shown)


if __name__ == "__main__":
    main()
