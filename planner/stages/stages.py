"""Where a model's layers are: pipeline stages, and the groups of ranks that follow from them. Decided once for a job.

A stage is consecutive layers on some ranks. Its ranks are replicas, one after the other, of `tensor_parallel` ranks of
one host each. The j-th replicas of all stages are pipeline j: every stage has the same number of replicas, so a
micro-batch stays in one pipeline. The gradient of a stage is summed over its replicas.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

from heteromesh.errors import UserError

REMAKE = "make the plan again with `heteromesh plan`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Consecutive layers, and the ranks that hold them."""

    ranks: tuple[int, ...]
    """World ranks, replica by replica: ranks[j * t : (j + 1) * t] is replica j, where t is `tensor_parallel`."""
    layers: int
    tensor_parallel: int = 1

    @property
    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """Per pipeline, the ranks that share the stage's tensors."""
        t = self.tensor_parallel
        return tuple(self.ranks[i : i + t] for i in range(0, len(self.ranks), t))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Stages in the order of their layers. Raises UserError where they don't fit each other."""

    stages: tuple[Stage, ...]
    micro_batches: tuple[int, ...]
    """Per pipeline, the micro-batches that it runs in a step."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError(f"a placement has no stage: {REMAKE}")
        for index, stage in enumerate(self.stages):
            if stage.layers < 1 or stage.tensor_parallel < 1:
                raise UserError(
                    f"stage {index} has {stage.layers} layers and tensor_parallel {stage.tensor_parallel}: "
                    f"both must be at least 1; {REMAKE}"
                )
            if len(stage.ranks) != stage.tensor_parallel * len(self.micro_batches):
                raise UserError(
                    f"stage {index} has {len(stage.ranks)} ranks for {len(self.micro_batches)} pipelines with "
                    f"tensor_parallel {stage.tensor_parallel}: every pipeline needs that many; {REMAKE}"
                )
        ranks = [rank for stage in self.stages for rank in stage.ranks]
        if len(set(ranks)) < len(ranks) or min(ranks) < 0:
            raise UserError(f"the stages' ranks {ranks} must be different and at least 0: {REMAKE}")
        if min(self.micro_batches) < 1:
            raise UserError(f"micro_batches {list(self.micro_batches)} must be at least 1 for each pipeline: {REMAKE}")

    @property
    def layers(self) -> int:
        """The layers of the model."""
        return sum(stage.layers for stage in self.stages)

    @property
    def first_layers(self) -> tuple[int, ...]:
        """Per stage, the index of its first layer."""
        return tuple(accumulate((stage.layers for stage in self.stages[:-1]), initial=0))

    @property
    def pipelines(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """pipelines[j][s]: the ranks of pipeline j in stage s (one rank without tensor parallel)."""
        return tuple(zip(*(stage.replicas for stage in self.stages), strict=True))

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """Per stage, its first layer and the one after its last."""
        return tuple((first, first + s.layers) for first, s in zip(self.first_layers, self.stages, strict=True))

    def stage_of(self, rank: int) -> int:
        """Returns the index of the stage that a rank is in. Raises UserError for a rank in none."""
        for index, stage in enumerate(self.stages):
            if rank in stage.ranks:
                return index
        raise UserError(f"rank {rank} is in no stage of the placement: start as many ranks as the plan has")

    def in_flight(self, stage: int, pipeline: int) -> int:
        """Counts micro-batches that a stage holds at most under 1F1B: one more than the stages behind it."""
        return min(self.micro_batches[pipeline], len(self.stages) - stage)


def placement_to_json(placement: Placement) -> dict[str, Any]:
    """Returns {stages [{ranks, layers, tensor_parallel}], micro_batches}."""
    return asdict(placement)


def placement_from_json(data: Any, where: str) -> Placement:
    """Returns what `placement_to_json` wrote; raises UserError on unknown or missing keys and on values of the wrong
    kind.
    """
    raw = check_keys(data, [f.name for f in fields(Placement)], where)
    if not isinstance(raw["stages"], list | tuple):
        raise UserError(f"{where}.stages is {raw['stages']!r}: it must be a list of stages; {REMAKE}")
    stages = []
    for index, item in enumerate(raw["stages"]):
        at = f"{where}.stages[{index}]"
        stage = check_keys(item, [f.name for f in fields(Stage)], at)
        ranks = _whole(stage["ranks"], f"{at}.ranks")
        (layers,) = _whole([stage["layers"]], f"{at}.layers")
        (tensor,) = _whole([stage["tensor_parallel"]], f"{at}.tensor_parallel")
        stages.append(Stage(ranks=ranks, layers=layers, tensor_parallel=tensor))
    return Placement(stages=tuple(stages), micro_batches=_whole(raw["micro_batches"], f"{where}.micro_batches"))


def check_keys(data: Any, names: Collection[str], where: str) -> Mapping[str, Any]:
    """`data` if it is a mapping with exactly these keys; raises UserError else."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {data!r}: it must be an object with {', '.join(names)}; {REMAKE}")
    unknown, missing = sorted(set(data) - set(names)), sorted(set(names) - set(data))
    if unknown:
        raise UserError(f"{where} has the unknown key {unknown[0]!r}: known keys are {', '.join(names)}")
    if missing:
        raise UserError(f"{where} lacks the key {missing[0]!r}: {REMAKE}")
    return data


def _whole(values: Any, where: str) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{where} is {values!r}: it must be a list of whole numbers; {REMAKE}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{where} has {value!r}: it must be a whole number; {REMAKE}")
    return tuple(values)
