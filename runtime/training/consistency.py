"""Before anything else the ranks of a job make sure that they were told the same.

Version, files, settings, data, optimizer, model: what differs would hang the job or train something that nobody asked
for, so it ends in one sentence on every rank instead. Costs two small messages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch

import heteromesh
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.training.build import build_cluster, cluster_path, plan_path
from heteromesh.runtime.training.job import Job, name_of
from heteromesh.runtime.training.job_check import check_job

NOTHING = "none"
LOCAL = frozenset(("cluster", "plan", "cost", "plan_ahead", "plan_seconds", "print_plans"))
"""Settings that only matter on one rank, or that are paths of files whose content is compared."""
WAYS_OUT = {
    "heteromesh": "install the same version on every host",
    "file": "give every host the same file",
    "data": (
        "give every host the same documents, tokenizer and max_length "
        "(Python's own sources differ between Python versions)"
    ),
    "model": "build the same model on every rank",
    "optimizer": "make the same optimizer and schedule on every rank",
    "loss": "give every rank the same loss=",
    "setting": "give every rank the same TrainerConfig",
}
"""What to do about a difference, by the kind of fact."""

Facts = dict[str, tuple[str, str]]
"""Kind (a key of WAYS_OUT) and value, by name; in the order in which a difference is told."""


def check_equal(world: World, tell: Callable[[], Facts]) -> None:
    """Returns when `tell` says the same on every rank.

    Otherwise raises UserError, equal on every rank: what rank differs from rank 0, in what, both values and the way
    out. A UserError of `tell` itself is raised on every rank too.
    """
    if world.size == 1:
        tell()
        return
    facts, error = Facts(), ""
    try:
        facts = tell()
    except UserError as mistake:
        error = str(mistake)
    mine = json.dumps([error, facts])
    # digests first: a big model's parameters are a long list
    digests = set(world.gather("" if error else _digest(mine)))
    if len(digests) == 1 and not error:
        return
    told = [json.loads(text) for text in world.gather(mine)]
    errors = [rank_error for rank_error, _ in told]
    first = next((rank for rank, text in enumerate(errors) if text), None)
    if first is not None:
        raise UserError(errors[first] if len(set(errors)) == 1 else f"on rank {first}, {errors[first]}")
    rows = [row for _, row in told]
    rank = next(rank for rank, row in enumerate(rows) if list(row.items()) != list(rows[0].items()))
    raise UserError(_difference(rank, rows[rank], rows[0]))


def _difference(rank: int, theirs: Facts, ours: Facts) -> str:
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    # names that only one has first: they explain the others
    names.sort(key=lambda name: name in ours and name in theirs)
    name = names[0] if names else next(a for a, b in zip(ours, theirs, strict=True) if a != b)
    kind = (ours.get(name) or theirs[name])[0]
    values = [side.get(name, (kind, NOTHING))[1] for side in (theirs, ours)]
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    if values[0] == values[1]:
        return f"rank {rank} has the {name} in another order than rank 0{more}: {WAYS_OUT[kind]}"
    return f"rank {rank} has {name} {values[0]} and rank 0 has {values[1]}{more}: {WAYS_OUT[kind]}"


def job_facts(job: Job, ranks: int) -> Facts:
    """What all ranks of a training job must agree on. Raises UserError for a bad cluster file and a bad job."""
    check_job(job)
    config = job.config
    cluster = build_cluster(config, ranks)
    facts = Facts()
    facts["the cluster file's fingerprint"] = "file", cluster.fingerprint
    facts["the cluster file's measured values"] = "file", _digest(repr(cluster.measured))
    facts |= _files(plan=plan_path(config), cost=config.cost)
    return {"heteromesh's version": ("heteromesh", heteromesh.__version__)} | facts | _trainer_facts(job)


def elastic_facts(job: Job) -> dict[str, str]:
    """What all members of a job must have in common, whoever joins when; the model's tensors in one line."""
    facts = {"heteromesh's version": heteromesh.__version__}
    config = job.config
    files = _files(cluster=cluster_path(config), plan=plan_path(config), cost=config.cost)
    facts |= {name: value for name, (_, value) in files.items()}
    tensors = []
    for name, (kind, value) in _trainer_facts(job).items():
        if kind == "model":
            tensors.append(f"{name} {value}")
        else:
            facts[name] = value
    facts["the model"] = f"{len(tensors)} tensors ({_digest(' '.join(tensors))})"
    return facts


def _files(**paths: str | Path | None) -> Facts:
    return {
        f"the {what} file": ("file", _content(Path(path), what) if path else NOTHING) for what, path in paths.items()
    }


def _trainer_facts(job: Job) -> Facts:
    config, facts = job.config, Facts()
    for setting in fields(TrainerConfig):
        if setting.name not in LOCAL:
            facts[setting.name] = "setting", _setting(setting.name, getattr(config, setting.name))
    content = (job.sampler.state_dict()["dataset"], job.data_fingerprint)
    facts["the weights"] = "file", job.initial.check() or NOTHING
    facts["the loss"] = "loss", name_of(job.loss) or NOTHING
    facts["the data"] = "data", f"{len(job.reader.lengths)} sequences ({_digest(repr(content))})"
    facts.update((name, ("model", value)) for name, value in _model(job.model))
    facts.update((name, ("optimizer", value)) for name, value in _optimizer(job))
    return facts


def _setting(name: str, value: object) -> str:
    return os.path.abspath(str(value)) if name == "run_dir" else repr(value)


def _optimizer(job: Job) -> Iterator[tuple[str, str]]:
    yield "the optimizer", type(job.optimizer).__name__
    for i, group in enumerate(job.optimizer.param_groups):
        for name, value in group.items():
            told = f"{len(value)} tensors" if name == "params" else repr(value)
            yield f"the optimizer's {name} (group {i})", told
    yield "the schedule", type(job.schedule).__name__ if job.schedule is not None else NOTHING


def _model(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    for name, parameter in model.named_parameters():
        trained = "trained" if parameter.requires_grad else "frozen"
        yield f"the parameter {name}", f"{_tensor(parameter)}, {trained}"
    for name, buffer in model.named_buffers():
        yield f"the buffer {name}", _tensor(buffer)


def _tensor(tensor: torch.Tensor) -> str:
    told = f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
    # what is expanded on one rank alone can't take the other's values
    is_expanded = tensor.layout is torch.strided and 0 in tensor.stride() and tensor.numel() > 1
    return f"{told}, expanded" if is_expanded else told


def _content(path: Path, what: str) -> str:
    try:
        return _digest(path.read_bytes().decode(errors="replace"))
    except OSError as error:
        raise UserError(f"{what} file {path} can't be read ({error.strerror}): every rank needs it") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
