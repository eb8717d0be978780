"""Every causal decoder of Transformers, tiny and random, as the Trainer takes it: exact or refused (docs/models.md).

    python benchmarks/decoders.py                      # all (about ten minutes on one core)
    python benchmarks/decoders.py --only llama gemma3_text
    python benchmarks/decoders.py --resume             # those that the table lacks

A model goes the Trainer's way: the engine and the trial before the first step, which may refuse it; then one step,
packed on 1 rank and split over 2 and 3. Loss and gradients are compared with plain torch: attn_implementation="eager",
one sequence at a time, no position_ids, the mean over all tokens. Each model has its own processes, seconds and memory.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "support")]
from heteromesh.errors import UserError
from heteromesh.parallel.transformers import register
from heteromesh.planner.plan import Pass, Step
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.training.trial import learn_buffers, try_model
from heteromesh.runtime.work.reader import Reader
from ranks import World, run_ranks
from tiny_decoders import VOCABULARY, NoTinyModel, tiny_model

TABLE = ROOT / "docs" / "models.md"
LENGTHS = (75, 40, 61, 9, 30)
METHODS = {1: "local", 2: "gather", 3: "trimmed_ring"}
LOSS_OFF, GRADIENT_OFF = 1e-4, 1e-3
"""Largest differences of the loss, and of the gradient in parts of its norm."""
SECONDS, MEMORY = 90.0, 12 << 30
Verdict = tuple[str, str]
"""(exact, refused, different, fails, none), and why or how far off."""


def documents() -> list[torch.Tensor]:
    """Random ids but those with a meaning of their own (padding, begin, end)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def a_step(ranks: int) -> Step:
    """Two sequences over all ranks, the others packed on the last one; on one rank all are packed."""
    split: tuple[int, ...] = (0, 2) if ranks > 1 else ()
    rest = tuple(j for j in range(len(LENGTHS)) if j not in split)
    passes = [a_pass((ranks - 1,), "local", rest, (tuple(LENGTHS[j] for j in rest),))]
    if split:
        bounds = [[LENGTHS[j] * (r * (r + 1)) // (ranks * (ranks + 1)) for r in range(ranks + 1)] for j in split]
        shards = tuple(tuple(b[r + 1] - b[r] for b in bounds) for r in range(ranks))
        passes.insert(0, a_pass(tuple(range(ranks)), METHODS[ranks], split, shards))
    return Step(passes=tuple(passes), seconds=0, bound_seconds=0, gap=0, solve_seconds=0, batch=LENGTHS)


def a_pass(ranks: tuple[int, ...], method: str, sequences: tuple[int, ...], shards: Any) -> Pass:
    return Pass(ranks=ranks, method=method, sequences=sequences, shards=shards, seconds=0.0)


def alone(kind: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in plain torch."""
    model, total = tiny_model(kind, "eager").to(dtype), 0.0
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for tokens in documents():
        logits = model(input_ids=tokens[None], **options).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum") / (sum(LENGTHS) - len(LENGTHS))
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def plainly(kind: str) -> tuple[torch.dtype, float, dict[str, torch.Tensor]]:
    """What is right, in float64 where the model can."""
    try:
        return torch.float64, *alone(kind, torch.float64)
    except NoTinyModel:
        raise
    except Exception:
        return torch.float32, *alone(kind, torch.float32)


def attempt(world: World, kind: str) -> Verdict:
    """What comes of a model on this many ranks."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    quiet()
    register()
    try:
        dtype, expected, gradients = plainly(kind)
    except Exception as error:
        return "none", said(error)
    try:
        return compared(world, tiny_model(kind, "heteromesh").to(dtype), expected, gradients)
    except NoTinyModel as error:
        return "refused", f"by Transformers: {error}"
    except UserError as error:
        return "refused", reason(" ".join(str(error).split()))
    except Exception as error:
        return "fails", said(error)


def compared(world: World, model: Any, expected: float, gradients: dict[str, torch.Tensor]) -> Verdict:
    """Takes the model the Trainer's way through a step."""
    reader, step = Reader(documents()), a_step(world.size)
    executor = StepExecutor(model, world)
    if world.size == 1:
        try_model(model, reader, None)
        learn_buffers(executor.engine, reader, world)
    result = executor.run(step, reader.step_inputs(step, range(len(LENGTHS)), world.rank))
    executor.close()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradient = norm([found.get(n, torch.zeros_like(g)) - g for n, g in gradients.items()]) / norm(gradients.values())
    loss = abs(result.loss - expected)
    exact = loss <= LOSS_OFF and gradient <= GRADIENT_OFF
    return "exact" if exact else "different", f"{loss:.0e}, {gradient:.0e}"


def reason(sentence: str) -> str:
    """The sentence of a refusal without what all of them say."""
    named = re.search(
        r"other losses for (.+) than for each alone.* explains \S+: (.+) is the first to differ", sentence
    )
    if named:
        return f"{named[1]}: {named[2]} is the first to differ"
    return re.split(r", though not on each|: it is called|: a pass tells", sentence)[0]


def norm(tensors: Any) -> float:
    return float(torch.cat([t.detach().double().flatten() for t in tensors]).norm())


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def quiet() -> None:
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()


def verdict_of(kind: str) -> Verdict:
    """The worst of 1, 2 and 3 ranks; refused ones are not tried further."""
    worst: Verdict = "none", ""
    for ranks in METHODS:
        try:
            found = run_ranks(ranks, attempt, kind, seconds=SECONDS)
        except AssertionError as error:
            lines = str(error).strip().splitlines()
            return "fails", f"on {ranks} ranks: {lines[-1][:160]}"
        for verdict in found:
            if verdict[0] != "exact":
                return verdict[0], f"on {ranks} ranks: {verdict[1]}" if ranks > 1 else verdict[1]
            worst = max(worst, verdict, key=lambda v: [float(x) for x in v[1].split(",") if x])
    return worst


def rows() -> dict[str, Verdict]:
    """The table's rows, if there is one."""
    cells = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return {name.strip("`"): (verdict, why.replace("\\|", "|")) for name, verdict, why in cells}


def write(found: dict[str, Verdict], versions: str) -> None:
    """Writes docs/models.md."""
    counts = {v: sum(1 for verdict, _ in found.values() if verdict == v) for v in ORDER}
    lines = [HEAD.format(versions=versions, total=len(found), loss=LOSS_OFF, gradient=GRADIENT_OFF, **counts)]
    for verdict in ORDER:
        names = sorted(n for n, v in found.items() if v[0] == verdict)
        if names:
            lines.append(f"\n## {ORDER[verdict]}\n\n| architecture | | {COLUMN.get(verdict, 'why')} |\n|---|---|---|\n")
            lines += ["| `{}` | {} | {} |\n".format(n, verdict, found[n][1].replace("|", "\\|")) for n in names]
    TABLE.write_text("".join(lines))


ORDER = {
    "different": "Different",
    "fails": "Fail",
    "exact": "Exact",
    "refused": "Refused before the first step",
    "none": "Not tried: no tiny configuration",
}
COLUMN = {"exact": "loss off by, gradient off by (of its norm)", "refused": "the sentence"}
HEAD = """# Models of Transformers

Made by `python benchmarks/decoders.py` ({versions}): every architecture that `AutoModelForCausalLM`
knows, as a tiny random model (weights of spread 0.4, windows of 16 tokens, no dropout) with
`attn_implementation="heteromesh"`, packed on 1 rank and split over 2 and 3, against plain torch one sequence at a
time, in float64 where the model can (the rest of a difference is what a model computes in float32 all the same). Exact:
the loss is off by at most {loss:g} and the gradient by {gradient:g} of its norm. Refused: before the first step, by
one sentence. A configuration may turn on what the tiny one has off: the check before the first step tries your own.

{total} architectures: {exact} exact, {refused} refused, {different} different, {fails} fail, {none} not tried.
"""


def main() -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(known), metavar="NAME")
    parser.add_argument("--resume", action="store_true", help="go on with those that the table lacks")
    options = parser.parse_args()
    found = rows() if TABLE.exists() and (options.only or options.resume) else {}
    names = options.only or [name for name in known if name not in found]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    for number, name in enumerate(names, 1):
        found[name] = verdict_of(name)
        print(f"{number}/{len(names)} {name}: {', '.join(found[name])}", flush=True)
        write(found, versions)


if __name__ == "__main__":
    main()
