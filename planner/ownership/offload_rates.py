"""What the lanes of a rank carry when its optimizer state lies on several tiers, and how much memory each tier has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from heteromesh.errors import UserError

Tier = Literal["resident", "staged", "host", "disk"]
"""Where a subgroup's state lies and is updated: on the device; in host memory, but updated on the device; in host
memory and updated there; on disk and updated in host memory."""
TIERS: tuple[Tier, ...] = ("resident", "staged", "host", "disk")

Resource = Literal["device", "host", "to_device", "to_host", "read", "write", "disk", "host_memory"]
RESOURCES: tuple[Resource, ...] = ("device", "host", "to_device", "to_host", "read", "write", "disk", "host_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadRates:
    """How fast one rank updates and moves state: parameters or bytes a second, infinite where it takes no time."""

    host_update: float
    """Parameters a second of the update on the host, with the cast of the weights where that is part of it."""
    device_update: float = math.inf
    """Parameters a second of the update on the device."""
    downscale: float = math.inf
    """Parameters a second of casting weights on the host, where that follows the update on the same cores."""
    to_device: float = math.inf
    """Bytes a second from host memory to the device."""
    to_host: float = math.inf
    host_memory: float = math.inf
    """Bytes a second that host memory reads and writes in all."""
    disk_read: float = math.inf
    disk_write: float = math.inf
    disk: float = math.inf
    """Bytes a second that the disk reads and writes together."""
    state_bytes: float = 12.0
    """Of a parameter: master weight and two moments in fp32."""
    weight_bytes: float = 2.0
    """Of a parameter that goes to the device after an update on the host."""
    gradient_bytes: float = 2.0
    """Of a parameter's gradient."""
    gradients_early: bool = True
    """Whether gradients reach the host during the backward, so that the update doesn't wait for them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not value > 0 and not field.name.endswith("_bytes"):
                raise UserError(f"the rate {field.name} is {value}: measure it and give what it does in a second")

    @property
    def host_seconds(self) -> float:
        """Seconds that the host takes for a parameter."""
        return 1 / self.host_update + 1 / self.downscale

    def seconds(self, tier: Tier) -> dict[Resource, float]:
        """Returns how long a parameter of a tier keeps each resource busy.

        Host memory: an update in place reads and writes state, reads the gradient and writes the weight, which is read
        again on its way out; a staged one is read and written; from disk state is written and read once more.
        """
        state, weight = self.state_bytes, self.weight_bytes
        early = 0.0 if self.gradients_early else self.gradient_bytes / self.to_host
        updated = {
            "host": self.host_seconds,
            "to_device": weight / self.to_device,
            "to_host": early,
            "host_memory": (2 * state + self.gradient_bytes + 2 * weight) / self.host_memory,
        }
        by_tier: Mapping[Tier, Mapping[str, float]] = {
            "resident": {"device": 1 / self.device_update},
            "staged": {
                "device": 1 / self.device_update,
                "to_device": state / self.to_device,
                "to_host": state / self.to_host,
                "host_memory": 2 * state / self.host_memory,
            },
            "host": updated,
            "disk": updated
            | {
                "host_memory": updated["host_memory"] + 2 * state / self.host_memory,
                "read": state / self.disk_read,
                "write": state / self.disk_write,
                "disk": 2 * state / self.disk,
            },
        }
        return {resource: by_tier[tier].get(resource, 0.0) for resource in RESOURCES}


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadMemory:
    """Bytes that each tier may hold of one rank's optimizer state."""

    device: float = 0.0
    """Beside all else that the device holds during forward and backward."""
    staging: float = math.inf
    """Of the device while the optimizer runs: what activations leave free then."""
    host: float = math.inf
    disk: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise UserError(f"the {field.name} memory is {getattr(self, field.name)} bytes: give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadRank:
    """What one rank has to update, how fast, and where it may lie."""

    parameters: int
    rates: OffloadRates
    memory: OffloadMemory = OffloadMemory()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedResource:
    """A resource that several ranks use at once: a host's memory, a switch of PCIe, a disk."""

    resource: Resource
    ranks: tuple[int, ...]
    per_second: float
    """Bytes a second for all of them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """Memory that several ranks' state lies in: their host's, or a disk."""

    tier: Literal["host", "disk"]
    ranks: tuple[int, ...]
    bytes: float
