"""What a run's memory was predicted to be, and what it came to: by rank, once at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from heteromesh.comm.world import World
from heteromesh.planner.ownership.memory import MemoryByKind
from heteromesh.runtime.hooks.api import Hook, StepCommitted, TrainingReport
from heteromesh.runtime.process.memory import forget_peak, peak_bytes

Predicted = Callable[[Sequence[float], Sequence[float]], Sequence[MemoryByKind]]
"""Returns by rank what it holds in a step of so many tokens, in its largest pass and in all; empty: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """A rank's memory in bytes."""

    measured: float
    """The most in training."""
    predicted: MemoryByKind | None
    """For the step that was predicted to take most; None: not known."""
    moments: Mapping[str, float]
    """Of the optimizer's state, on each tier: device, host, disk; empty: not known."""


class MemoryRecord(Hook):
    """Compares the memory of a world that stays with what the steps' plans make of it."""

    def __init__(
        self,
        world: World,
        predicted: Predicted,
        say: Callable[[str], None],
        write: Callable[[object], None],
        moments: Callable[[], Sequence[Mapping[str, float]]],
    ) -> None:
        """predicted: see `Predicted`. say, write: take a line for people and a JSON value, on the rank that writes.
        moments: returns by rank the bytes of optimizer state by tier; empty: all is where it was predicted.
        """
        self._world, self._predicted, self._say, self._write = world, predicted, say, write
        self._moments = moments
        self._steps: list[list[tuple[int, int]]] = [[] for _ in range(world.size)]
        """By rank, (tokens of its largest pass, tokens in all) of those steps that none had more of both than."""

    def begin(self) -> None:
        """The most counts from here."""
        forget_peak(self._world.device)

    def step_committed(self, step: StepCommitted) -> None:
        ranks = step.world.size
        largest, in_all = [0] * ranks, [0] * ranks
        for each in step.rounds:
            for p in each.plan.passes:
                for rank, row in zip(p.ranks, p.shards, strict=True):
                    largest[rank] = max(largest[rank], sum(row))
                    in_all[rank] += sum(row)
        for known, pass_, all_ in zip(self._steps, largest, in_all, strict=True):
            if not any(p >= pass_ and t >= all_ for p, t in known):
                known[:] = [(p, t) for p, t in known if p > pass_ or t > all_] + [(pass_, all_)]

    def end(self, report: TrainingReport) -> None:
        measured = self._world.gather(peak_bytes(self._world.device))
        if not any(self._steps) or not self._world.writes:
            return
        found = [self._of(rank, m) for rank, m in enumerate(measured)]
        self._write([asdict(each) for each in found])
        self._say(told(found))

    def _of(self, rank: int, measured: float) -> RankMemory:
        predicted, tiers = self._most(rank), self._moments()
        moments: Mapping[str, float] = {}
        if tiers:
            moments = tiers[rank]
        elif predicted is not None:
            moments = {"device": predicted.moments, "host": 0.0, "disk": 0.0}
        return RankMemory(measured=measured, predicted=predicted, moments=moments)

    def _most(self, rank: int) -> MemoryByKind | None:
        """Returns the prediction for the rank's step that takes most."""
        found: list[MemoryByKind] = []
        for pass_, in_all in self._steps[rank]:
            tokens = [[n if r == rank else 0 for r in range(len(self._steps))] for n in (pass_, in_all)]
            found += self._predicted(*tokens)[rank : rank + 1]
        return max(found, key=lambda kinds: kinds.total, default=None)


def told(ranks: Sequence[RankMemory]) -> str:
    """Returns a line for people."""
    measured = " / ".join(f"{rank.measured / 1e9:.2f}" for rank in ranks)
    known = [rank.predicted.total for rank in ranks if rank.predicted is not None]
    predicted = f"predicted {' / '.join(f'{size / 1e9:.2f}' for size in known)} GB, " if known else ""
    lower = [
        f"; {' / '.join(f'{rank.moments[tier] / 1e9:.2f}' for rank in ranks)} GB of moments {where}"
        for tier, where in (("host", "in host memory"), ("disk", "on disk"))
        if any(rank.moments.get(tier) for rank in ranks)
    ]
    return f"memory per rank: {predicted}measured {measured} GB{''.join(lower)}"
