"""Measured or published cost constants as TOML; planner/cost/measured.py binds them to a cluster.

The same keys stand in a `--cost` file, in a cluster file's `[measured]` table and in a run directory's config.json.
Seconds are for the fastest device of the cluster, tokens for the one with the most memory (docs/cluster-file.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner import files


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What a pass costs on the reference device: the `a`, `b`, `c` of planner/cost/passes.py and its bytes."""

    seconds_per_token2: float = field(metadata=files.ZERO)
    seconds_per_token: float = field(metadata=files.ZERO)
    seconds_per_pass: float = field(metadata=files.ZERO)
    seconds_per_split_pass: float = field(default=0.0, metadata=files.ZERO)
    seconds_per_round: float = field(default=0.0, metadata=files.ZERO)
    seconds_per_tile: float = field(default=0.0, metadata=files.ZERO)
    seconds_per_step: float = field(default=0.0, metadata=files.ZERO)
    bytes_per_token: float = field(metadata=files.ZERO)
    """Moved by the method, forward and backward, per token of a rank's shard."""
    tokens_per_device: int
    """Memory, in tokens of activations."""
    bytes_per_second: dict[int, float] = field(default_factory=dict)
    """The rate of a device each way, by degree of the pass."""
    method: str = "ulysses"

    @property
    def seconds(self) -> dict[str, Any]:
        """The constants that `Costs` has under the same names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("seconds_")}


def constants_from_table(table: Mapping[str, Any], where: str) -> Constants:
    """Returns constants from parsed TOML or JSON; raises UserError on unknown, missing or senseless values."""
    constants = files.build(Constants, table, where)
    for degree in constants.bytes_per_second:
        if degree < 2:
            raise UserError(f"{where}: bytes_per_second has the key {degree}: it must be a degree, 2 or more")
    if not constants.seconds_per_token2 and not constants.seconds_per_token:
        raise UserError(
            f"{where}: seconds_per_token2 and seconds_per_token are both 0: "
            "at least one must be above zero, or every plan would be as good as any other"
        )
    if constants.bytes_per_token and not constants.bytes_per_second:
        raise UserError(
            f"{where}: bytes_per_token is {constants.bytes_per_token:g} and [bytes_per_second] is empty: "
            "give the rate of at least one degree"
        )
    return constants


def load_constants(path: Path) -> Constants:
    """Reads a `--cost` file."""
    return constants_from_table(files.read_toml(path, "cost file"), f"cost file {path}")
