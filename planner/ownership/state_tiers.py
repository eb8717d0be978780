"""Which part of a rank's optimizer state leaves the device's memory in a running job, and what stays there of the rest.

State moves to a lower tier only where memory is short, and no more of it than must: host memory first, where that is
not the device's own, then the disk. The way there takes memory too: some subgroups are on it at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from heteromesh.planner.ownership.offload import ALIGNMENT, RING, SUBGROUP

Offload = Literal["auto", "none", "host", "disk"]
"""What the user wants: see TrainerConfig.offload_optimizer."""
SUBGROUPS = 64
"""Of a rank's state, at least: what is on its way then takes 8 % of it."""
ON_THE_WAY = (RING + 1) / SUBGROUPS
"""Of a rank's state: the ring of the disk tier, and a record that is read for a checkpoint."""
HALVINGS = 6
LEAST = 1e-3
"""Of a rank's state; less is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTiers:
    """Shares of a rank's optimizer state, which add up to 1."""

    device: float = 1.0
    host: float = 0.0
    disk: float = 0.0

    @property
    def is_offloaded(self) -> bool:
        """Whether anything is not in the device's memory."""
        return self.device < 1

    @property
    def in_memory(self) -> float:
        """Returns how much of the state the device's memory has at the most, what is on its way included."""
        return min(1.0, self.device + ON_THE_WAY) if self.is_offloaded else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerMemory:
    """Bytes below a rank's device for its optimizer state."""

    host: float = 0.0
    """0 where host memory is the device's."""
    disk: float = 0.0


def tiers_of(asked: Offload, kept: float, state: float, lower: LowerMemory) -> StateTiers:
    """Returns where a rank's state lies of which a share stays on the device, if it may.

    asked: host and disk move everything, to that tier alone. state: bytes of all of the rank's state.
    """
    if asked in ("host", "disk"):
        # on a device whose memory is the host's there is no other host memory
        if asked == "host":
            return StateTiers(device=0.0, host=1.0) if lower.host else StateTiers()
        return StateTiers(device=0.0, disk=1.0)
    if kept >= 1 or asked == "none" or state <= 0:
        return StateTiers()
    host = min(1 - kept, lower.host / state)
    disk = 1 - kept - host
    return StateTiers(device=kept, host=host, disk=disk if disk > LEAST else 0.0)


def kept_share(free: float, state: float) -> float:
    """Returns the share of a rank's state that fits, what is on its way included; negative: not even that does.

    free: bytes of its memory beside all else.
    """
    if state <= 0 or free >= state:
        return 1.0 if free >= 0 else -1.0
    kept = free / state - ON_THE_WAY
    return kept if kept >= 0 else (0.0 if kept > -1e-9 else -1.0)


def least_offloaded(works: Callable[[tuple[float, ...]], bool], memory: Sequence[float]) -> tuple[float, ...] | None:
    """Returns by rank the share of its state that stays on the device, as large as `works` allows; None: none does.

    The same share on all ranks first, then all of it on whichever can do with that, those with the most memory first.
    """
    count = len(memory)
    if works((1.0,) * count):
        return (1.0,) * count
    if not works((0.0,) * count):
        return None
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if works((middle,) * count) else (low, middle)
    kept = [low] * count
    for size in sorted(set(memory), reverse=True):
        more = [1.0 if memory[rank] == size else share for rank, share in enumerate(kept)]
        if works(tuple(more)):
            kept = more
    return tuple(kept)


def subgroup_numel(numel: int) -> int:
    """Returns the elements of a subgroup of a rank's state."""
    return max(ALIGNMENT, min(SUBGROUP, numel // SUBGROUPS // ALIGNMENT * ALIGNMENT))
