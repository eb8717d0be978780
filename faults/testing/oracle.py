"""Checkers for runs under faults: what was summed, what was committed, what stood still, what was left over."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

SLOTS = 8
"""Digits that an int64 sum with factors up to `_PHASES` holds without carry."""
_PHASES = 4
_BLOCK = 1024


def contribution(slot: int, step: int, count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Returns what the process in this slot contributes: 10**slot times 1..4, a pattern of position and step.

    In a sum each decimal digit counts how often a slot was added; the factor shows elements of another step or place.
    """
    return torch.mul(_pattern(step, count, dtype), 10**slot)


def expected(slots: Iterable[int], step: int, count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Returns the sum of these slots' contributions."""
    return torch.mul(_pattern(step, count, dtype), sum(10**slot for slot in slots))


def _pattern(step: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    blocks = torch.arange(-(-count // _BLOCK), dtype=torch.int64)
    return ((blocks + step) % _PHASES + 1).to(dtype).repeat_interleave(_BLOCK)[:count]


@dataclass(frozen=True, slots=True)
class CommitEvent:
    """One commit on one member."""

    member: int
    slot: int
    time: float
    """time.monotonic(), which all processes of a machine share."""
    step: int
    epoch: int
    digest: str
    chain: str
    right: bool
    """Whether the values were those of the contributor set."""
    attempts: int
    slots: tuple[int, ...]
    """Whose contributions are in it, by rank."""
    coordinates: bool = False
    """Whether the coordinator runs in this member's process."""


@dataclass(slots=True)
class History:
    """Everything that was committed, by member; `faults()` says what was wrong with it."""

    events: list[CommitEvent] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Finds wrong values, members that disagree on a step, steps out of order or left out. Empty: all is well."""
        found = [f"wrong sum: member {e.member} in step {e.step}" for e in self.events if not e.right]
        by_step: defaultdict[int, dict[tuple[str, int, str], list[str]]] = defaultdict(dict)
        by_member: defaultdict[int, list[int]] = defaultdict(list)
        for event in self.events:
            kind = event.digest, event.epoch, event.chain
            by_step[event.step].setdefault(kind, []).append(f"{event.member}{'*' if event.coordinates else ''}")
            by_member[event.member].append(event.step)
        for step, kinds in by_step.items():
            if len(kinds) > 1:
                who = "; ".join(f"in epoch {epoch} by {' '.join(them)}" for (_, epoch, _), them in kinds.items())
                found.append(f"step {step} was committed with {len(kinds)} results (* coordinates): {who}")
        for member, steps in by_member.items():
            if steps != list(range(steps[0], steps[0] + len(steps))):
                found.append(f"member {member} committed steps out of order, twice or with gaps")
        if by_step and sorted(by_step) != list(range(min(by_step), max(by_step) + 1)):
            found.append("a step number is missing")
        return found

    def longest_stall(self) -> float:
        """Seconds between two commits of the job (by whichever member was first)."""
        first: dict[int, float] = {}
        for event in self.events:
            first[event.step] = min(first.get(event.step, event.time), event.time)
        times = [first[step] for step in sorted(first)]
        return max((b - a for a, b in pairwise(times)), default=0.0)


@dataclass(frozen=True, slots=True)
class Belongings:
    """What this process holds now: to compare before and after."""

    threads: frozenset[str]
    files: int

    @classmethod
    def now(cls) -> Belongings:
        """Threads by name and the number of open descriptors."""
        return cls(frozenset(t.name for t in threading.enumerate()), len(os.listdir("/proc/self/fd")))

    def left_over(self, before: Belongings) -> list[str]:
        """Returns what was not there before."""
        found: Sequence[str] = sorted(self.threads - before.threads)
        left = [f"thread {name}" for name in found]
        if self.files > before.files:
            left.append(f"{self.files - before.files} open files")
        return left
