"""`heteromesh plan`: plans steps for a cluster that need not be here. Never imports torch."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from heteromesh.planner import plan as plans
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.cost.measured import model_measured_instead
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.model.lengths import LengthSource, open_lengths
from heteromesh.planner.model.spec import MODELS, load_model
from heteromesh.planner.participation.shortage import DoesNotFit
from heteromesh.planner.plan import Step
from heteromesh.planner.report.assemble import ANALYTIC, build_problem, make_plan
from heteromesh.planner.report.fixes import parse_fixes
from heteromesh.planner.report.text import plan_text
from heteromesh.runtime.cli.arguments import Parser, number, whole_number
from heteromesh.runtime.cli.output import check_writable, writing
from heteromesh.runtime.cli.terminal import say

DEFAULT_SEQUENCES = 512


def main(argv: Sequence[str]) -> int:
    """Plans, prints and writes; returns the exit code."""
    args = _parse(argv)
    fixes = parse_fixes(args.fix)
    cluster, model = load_cluster(args.cluster), load_model(args.model)
    problem = build_problem(cluster, model, load_constants(args.cost) if args.cost else None, fixes)
    source = open_lengths(args.lengths, seed=args.seed, max_length=fixes.max_length)
    if args.output:
        check_writable(args.output)
    tokens = args.batch_tokens or 0
    sequences = 0 if tokens else args.batch_sequences or DEFAULT_SEQUENCES
    with _progress(args.steps) as on_step:
        batches = source.batches(args.steps, sequences=sequences, tokens=tokens)
        try:
            plan = make_plan(problem, batches, time_limit=args.time_limit, on_step=on_step)
        except DoesNotFit as error:
            if args.json:
                print(json.dumps(error.document()))
            raise
    _say(source, len(plan.steps), args.steps)
    if problem.source == ANALYTIC and (other := model_measured_instead(cluster, model)):
        print(_OTHER_MODEL.format(cluster=args.cluster, other=other, model=args.model), file=sys.stderr)
    if args.output:
        with writing(args.output):
            plans.dump(plan, args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    if args.json:
        print(json.dumps(plans.to_json(plan)))
    else:
        batch = f"{tokens} tokens" if tokens else f"{sequences} sequences"
        seed = f", seed {args.seed}" if source.sampled else ", in order"
        say(plan_text(plan, problem, f"{source.what}{seed}; {batch} a step"))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("plan", "Plans training steps: which ranks work together on which sequences. Needs no device.")
    add = parser.add_argument
    add("--cluster", type=Path, required=True, metavar="F", help="cluster.toml (docs/cluster-file.md)")
    add("--model", required=True, metavar="M", help=f"{', '.join(MODELS)}; a Hugging Face config.json; a .toml")
    add("--lengths", required=True, metavar="F", help="text file, .npy, quantile table .json or lognormal:MU,SIGMA,MAX")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch-tokens", type=whole_number(1), metavar="N", help="tokens of a step's batch, at most")
    batch.add_argument(
        "--batch-sequences",
        type=whole_number(1),
        metavar="N",
        help=f"sequences of a step's batch (default {DEFAULT_SEQUENCES})",
    )
    add("--steps", type=whole_number(1), default=1, metavar="K", help="steps to plan (default 1)")
    add(
        "--cost", type=Path, metavar="F", help="measured cost constants, TOML; overrides the cluster's and the analytic"
    )
    add("--fix", action="append", default=[], metavar="NAME=VALUE", help=_FIX_HELP)
    add("--seed", type=whole_number(0), default=0, metavar="N", help="for sampled lengths (default 0)")
    add(
        "--time-limit",
        type=_SECONDS,
        default=0.2,
        metavar="S",
        help="processor seconds to solve a step (default 0.2)",
    )
    add("-o", "--output", type=Path, metavar="FILE", help="write plan.json here (docs/plan-file.md)")
    add("--json", action="store_true", help="print the plan as one JSON document and nothing else")
    return parser.parse(argv)


_SECONDS = number(lambda s: 0 < s < math.inf, "a number of seconds above 0")
_FIX_HELP = (
    "max_degree=N: ranks of a pass at most; method=NAME: the only way to split, local for none; "
    "max_length=N: drop longer sequences; checkpointing=on: recompute activations (analytic costs)"
)


_OTHER_MODEL = (
    "the measured constants of cluster file {cluster} are of a model of another shape, {other}: the costs are "
    "analytic; `heteromesh probe --model {model}` on that cluster measures this one"
)


def _say(source: LengthSource, planned: int, wanted: int) -> None:
    if source.dropped:
        print(f"dropped {source.dropped} sequences longer than max_length={source.max_length}", file=sys.stderr)
    if planned < wanted:
        steps = "1 step was" if planned == 1 else f"{planned} steps were"
        print(f"{source.what} ended: {steps} planned of {wanted}", file=sys.stderr)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[Step], None]]:
    """Shows a bar on stderr where that is a terminal and there is more than one step."""
    if steps == 1 or not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planning", total=steps)
        yield lambda step: progress.advance(task)
