"""What a plan is: a step is an ordered list of passes; a plan is a list of steps and their proof.

Readable as JSON (`schema: 1`, docs/plan-file.md); unknown keys are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from heteromesh.errors import UserError
from heteromesh.planner.files import written_whole

SCHEMA = 1
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Ranks and the sequences they work through together: one forward and one backward."""

    ranks: tuple[int, ...]
    """World ranks, ascending, without repeats."""
    method: str
    """How a sequence is split; `local` exactly when there is one rank."""
    sequences: tuple[int, ...]
    """Indices into the step's batch."""
    shards: tuple[tuple[int, ...], ...]
    """shards[i][j]: tokens of sequence j that rank i holds."""
    seconds: float
    """Predicted duration."""
    sent_bytes: tuple[int, ...] = ()
    """Predicted, per rank of the pass, attention's exchanges; empty where the model's attention is not known."""
    offload: float = 0.0
    """Share of its activations that the pass keeps in host memory between forward and backward."""

    def tokens(self, member: int) -> int:
        """Returns tokens held by the pass's `member`-th rank."""
        return sum(self.shards[member])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer update: the passes over one global batch, in the order every rank follows."""

    passes: tuple[Pass, ...]
    seconds: float
    """Predicted duration of the step."""
    bound_seconds: float
    """No pass list takes less under the same cost model."""
    gap: float
    """seconds / bound_seconds - 1."""
    solve_seconds: float
    batch: tuple[int, ...]
    """Length of every sequence of the batch, in tokens."""

    def passes_of(self, rank: int) -> tuple[tuple[int, Pass], ...]:
        """Returns (position in the step, pass) of every pass that names `rank`, in list order."""
        return tuple((i, p) for i, p in enumerate(self.passes) if rank in p.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """An alternative that lost."""

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCluster:
    """Which cluster a plan was made for."""

    fingerprint: str
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything decided before running."""

    schema: int = SCHEMA
    cluster: PlannedCluster
    model: str
    layout: dict[str, Any] = field(default_factory=dict)
    """What is fixed for the whole job, each with its predicted effect."""
    steps: tuple[Step, ...] = ()
    memory_bytes: tuple[int, ...] = ()
    """Predicted peak per rank."""
    memory: tuple[dict[str, int], ...] = ()
    """The same by kind, with what of the device can't be used; empty where it isn't known."""
    rejected: tuple[Rejected, ...] = ()


def to_json(value: Plan | Step) -> dict[str, Any]:
    """Returns the JSON object of a plan or a step."""
    return asdict(value)


def dump(plan: Plan, path: Path) -> None:
    """Writes the plan so that a reader never sees half a file. Raises UserError for a path that is no file."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: give the path of a file to write the plan to")
    with written_whole(path) as part:
        part.write_text(json.dumps(to_json(plan), indent=1) + "\n")


def step_from_json(data: Mapping[str, Any], where: str = "step") -> Step:
    """Returns a step from its JSON object; raises UserError on missing or unknown keys."""
    raw = _strict(Step, data, where)
    passes = tuple(_pass(p, f"{where}.passes[{i}]") for i, p in enumerate(raw.pop("passes")))
    return Step(passes=passes, batch=tuple(raw.pop("batch")), **raw)


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """Returns a plan from its JSON object; raises UserError on missing or unknown keys or another schema."""
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"plan schema {data.get('schema')!r} is not {SCHEMA}: make the plan again with `heteromesh plan`"
        )
    raw = _strict(Plan, {"memory": ()} | dict(data), "plan")
    raw["cluster"] = PlannedCluster(**_strict(PlannedCluster, raw["cluster"], "plan.cluster"))
    raw["steps"] = tuple(step_from_json(s, f"plan.steps[{i}]") for i, s in enumerate(raw["steps"]))
    raw["rejected"] = tuple(Rejected(**_strict(Rejected, r, "plan.rejected")) for r in raw["rejected"])
    raw["memory_bytes"], raw["memory"] = tuple(raw["memory_bytes"]), tuple(raw["memory"])
    return Plan(**raw)


def load(path: Path) -> Plan:
    """Reads plan.json; raises UserError naming the file, and the line where it does not parse."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"plan file {path} does not exist: make it with `heteromesh plan -o {path}`") from None
    except OSError as error:
        raise UserError(f"plan file {path} can't be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"plan file {path}{line} is not JSON ({error}): make it again with `heteromesh plan`") from None
    if not isinstance(data, dict):
        raise UserError(f"plan file {path} holds no JSON object: make it again with `heteromesh plan`")
    try:
        return plan_from_json(data)
    except (TypeError, KeyError) as error:
        raise UserError(f"plan file {path} is not a plan ({error}): make it again with `heteromesh plan`") from None


def _pass(data: Mapping[str, Any], where: str) -> Pass:
    raw = _strict(Pass, {"sent_bytes": (), "offload": 0.0} | dict(data), where)
    raw["sent_bytes"] = tuple(raw["sent_bytes"])
    raw["ranks"], raw["sequences"] = tuple(raw["ranks"]), tuple(raw["sequences"])
    raw["shards"] = tuple(tuple(row) for row in raw["shards"])
    return Pass(**raw)


def _strict(kind: type[T], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    names: Sequence[str] = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    unknown, missing = sorted(set(data) - set(names)), sorted(set(names) - set(data))
    if unknown:
        raise UserError(f"{where} has the unknown key {unknown[0]!r}: known keys are {', '.join(names)}")
    if missing:
        raise UserError(f"{where} lacks the key {missing[0]!r}")
    for entry in fields(kind):  # type: ignore[arg-type]
        rule, value = _SCALARS.get(str(entry.type)), data[entry.name]
        if rule and (not isinstance(value, rule) or isinstance(value, bool)):
            raise UserError(f"{where}.{entry.name} is {value!r}: it must be a {entry.type}")
    return dict(data)
