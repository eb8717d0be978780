"""What a run's memory was predicted to be, and what it came to: by rank, once at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from heteromesh.comm.world import World
from heteromesh.planner.ownership.memory import MemoryByKind
from heteromesh.planner.sequences.timeline import tokens_of
from heteromesh.runtime.hooks.api import Hook, StepCommitted, TrainingReport
from heteromesh.runtime.process.memory import forget_peak, peak_bytes

Predicted = Callable[[Sequence[float], Sequence[float]], Sequence[MemoryByKind]]
"""Returns by rank what it holds in a step of so many tokens, in its largest pass and in all, by rank; empty: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """A rank's memory in bytes."""

    measured: float
    """The most in training."""
    predicted: MemoryByKind | None
    """For the step that was predicted to take most; None: not known."""


class MemoryRecord(Hook):
    """Compares the memory of a world that stays with what the steps' plans make of it."""

    def __init__(
        self, world: World, predicted: Predicted, say: Callable[[str], None], write: Callable[[object], None]
    ) -> None:
        """predicted: see `Predicted`. say, write: take a line for people and a JSON value, on the rank that writes."""
        self._world, self._predicted, self._say, self._write = world, predicted, say, write
        self._steps: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        """(tokens of each rank's largest pass, tokens of each rank in all) of the steps so far."""

    def begin(self) -> None:
        """The most counts from here."""
        forget_peak(self._world.device)

    def step_committed(self, step: StepCommitted) -> None:
        ranks = step.world.size
        largest = [0] * ranks
        for each in step.rounds:
            for p in each.plan.passes:
                for rank, row in zip(p.ranks, p.shards, strict=True):
                    largest[rank] = max(largest[rank], sum(row))
        in_all = [sum(counts) for counts in zip(*(tokens_of(r.plan.passes, ranks) for r in step.rounds), strict=True)]
        self._steps.add((tuple(largest), tuple(in_all)))

    def end(self, report: TrainingReport) -> None:
        measured = self._world.gather(peak_bytes(self._world.device))
        if not self._steps or not self._world.writes:
            return
        predicted = self._most(len(measured))
        found = [RankMemory(measured=m, predicted=p) for m, p in zip(measured, predicted, strict=True)]
        self._write([asdict(each) for each in found])
        self._say(told(found))

    def _most(self, ranks: int) -> list[MemoryByKind | None]:
        """Returns by rank the prediction for the step that takes it most."""
        every = [made for steps in self._steps if (made := self._predicted(*steps))]
        if not every:
            return [None] * ranks
        return [max((made[rank] for made in every), key=lambda kinds: kinds.total) for rank in range(ranks)]


def told(ranks: Sequence[RankMemory]) -> str:
    """Returns a line for people."""
    measured = " / ".join(f"{rank.measured / 1e9:.2f}" for rank in ranks)
    known = [rank.predicted.total for rank in ranks if rank.predicted is not None]
    predicted = f"predicted {' / '.join(f'{size / 1e9:.2f}' for size in known)} GB, " if known else ""
    return f"memory per rank: {predicted}measured {measured} GB"
