"""`--fix NAME=VALUE`: decisions taken out of the planner's hands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from heteromesh.errors import UserError
from heteromesh.planner.cost.json import CappedMethod
from heteromesh.planner.cost.passes import LOCAL, Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixes:
    """What was fixed; None: left to the planner (or, for checkpointing, off)."""

    max_degree: int | None = None
    """Most ranks of a pass."""
    method: str | None = None
    """The only way to split a sequence; `local`: none is split."""
    max_length: int | None = None
    """Longer sequences are dropped, and counted."""
    checkpointing: bool | None = None
    """Activations are recomputed in backward (analytic costs only)."""

    def apply(self, costs: Costs) -> Costs:
        """Returns the costs without the methods that are ruled out; raises UserError on a method there is not."""
        methods = costs.methods
        if self.method is not None:
            known = [LOCAL, *(m.name for m in methods)]
            if self.method not in known:
                raise UserError(f"--fix method={self.method} is not a method of this cost model: use {_either(known)}")
            methods = tuple(m for m in methods if m.name == self.method)
        if self.max_degree is not None:
            methods = tuple(CappedMethod(**asdict(m), max_degree=self.max_degree) for m in methods)
        return replace(costs, methods=methods)


def parse_fixes(assignments: Sequence[str]) -> Fixes:
    """Fixes from NAME=VALUE words; dashes and underscores are the same in a name."""
    known = list(Fixes.__dataclass_fields__)
    values: dict[str, int | str | bool] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise UserError(f"--fix {assignment} names nothing that can be fixed: use NAME=VALUE with {_either(known)}")
        if name in values:
            raise UserError(f"--fix {name} is given twice: give it once")
        values[name] = _value(name, value.strip())
    return Fixes(**values)  # type: ignore[arg-type]


def _value(name: str, value: str) -> int | str | bool:
    if name == "method":
        return value
    if name == "checkpointing":
        if value not in ("on", "off"):
            raise UserError(f"--fix checkpointing={value} must be on or off")
        return value == "on"
    if not (value.isascii() and value.isdigit()) or int(value) == 0:
        raise UserError(f"--fix {name}={value} must be a whole number, at least 1")
    return int(value)


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
