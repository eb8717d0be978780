"""Parameters one after the other, cut into subgroups: which elements of which parameter lie where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.planner.ownership.offload import ALIGNMENT, OffloadPlan


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """Consecutive elements of one parameter in one subgroup."""

    parameter: int
    start: int
    """Of the parameter's elements the first one."""
    place: int
    """Where in the subgroup they begin."""
    numel: int
    first: int
    """`start`, counted in the parameter of which this one is a fragment."""
    of: int
    """Elements of that."""

    @property
    def of_parameter(self) -> slice:
        """Returns which elements of the parameter they are."""
        return slice(self.start, self.start + self.numel)

    @property
    def of_subgroup(self) -> slice:
        """Returns which elements of the subgroup they are."""
        return slice(self.place, self.place + self.numel)


def packed_numel(sizes: Sequence[int]) -> int:
    """Returns the elements of parameters of these sizes, each begun at a multiple of ALIGNMENT."""
    return sum(_aligned(size) for size in sizes)


def cut_segments(
    sizes: Sequence[int], plan: OffloadPlan, places: Sequence[tuple[int, int]] | None = None
) -> list[list[ParameterSlice]]:
    """Returns by subgroup what it holds of parameters of these sizes.

    places: where each begins in, and the elements of, the parameter of which it is a fragment.
    """
    found: list[list[ParameterSlice]] = [[] for _ in plan.subgroups]
    number, first = 0, 0
    for index, size in enumerate(sizes):
        done = 0
        while done < size:
            while plan.subgroups[number].stop <= first + done:
                number += 1
            subgroup = plan.subgroups[number]
            place = first + done - subgroup.start
            numel = min(size - done, subgroup.numel - place)
            begin, of = (0, size) if places is None else places[index]
            found[number].append(ParameterSlice(index, done, place, numel, begin + done, of))
            done += numel
        first += _aligned(size)
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
