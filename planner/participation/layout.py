"""A layout: which ranks work and which hold state only, who owns which weights, and what that takes of memory and time.

Four kinds, from what the Trainer does today to what takes least memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import Links, cluster_links
from heteromesh.planner.cost.analytic import CPU, analytic_costs
from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes

REPLICATED, SHARDED_OPTIMIZER = "replicated", "replicated, sharded optimizer"
SHARDED, GROUPED = "sharded weights", "sharded weights inside groups"
KINDS = (REPLICATED, SHARDED_OPTIMIZER, SHARDED, GROUPED)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is to be planned: a model on a cluster, for a batch."""

    cluster: Cluster
    model: ModelSpec
    batch: tuple[int, ...]
    """Lengths in tokens."""
    checkpointing: bool | None = None
    """Whether backward repeats the forward where weights are replicated; None: where it must, to fit."""
    adjust: Callable[[Costs], Costs] = field(default=lambda costs: costs)
    """Takes out of the costs what a user has ruled out."""

    @cached_property
    def host_ranks(self) -> tuple[tuple[int, ...], ...]:
        """Per host, its ranks."""
        found: list[list[int]] = [[] for _ in self.cluster.hosts]
        for rank, host in enumerate(self.cluster.rank_hosts):
            found[host].append(rank)
        return tuple(map(tuple, found))

    @cached_property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """Hosts that are alike: equal device, number, NICs, fabric, memory, and measured rates."""
        found: dict[object, list[int]] = {}
        speeds, measured = self.speeds, self.cluster.measured
        for number, host in enumerate(self.cluster.hosts):
            rates = tuple(table[number] for table in (measured.nic_gbit, measured.link_gbps) if table)
            own = tuple(speeds[r] for r in self.host_ranks[number])
            key = (host.device, host.count, host.fabric, host.nics, host.memory_gb, rates, own)
            found.setdefault(key, []).append(number)
        return tuple(map(tuple, found.values()))

    @cached_property
    def tokens(self) -> int:
        return sum(self.batch)

    @cached_property
    def speeds(self) -> tuple[float, ...]:
        """Per rank, relative to the fastest device."""
        return self.cluster.speeds()

    @cached_property
    def links(self) -> Links:
        """Of the whole cluster."""
        return cluster_links(self.cluster)

    def device_bytes(self, rank: int) -> float:
        """Returns a device's memory."""
        return self.cluster.device_of(rank).memory_gb * 1e9

    def host_bytes(self, host: int) -> float:
        """Returns the host's own memory that training may use; 0: not known, or it is the devices'."""
        described = self.cluster.hosts[host]
        return (described.memory_gb or 0.0) * 1e9 if described.device != CPU else 0.0

    def expected_tokens(self, ranks: Sequence[int]) -> dict[int, float]:
        """Returns by rank the tokens of a step that its speed would give it, and a tenth more."""
        power = sum(self.speeds[r] for r in ranks)
        return {r: 1.1 * self.tokens * self.speeds[r] / power for r in ranks}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLayout:
    """Who holds what in a job."""

    kind: str
    ranks: tuple[int, ...]
    """That work, ascending."""
    holders: tuple[int, ...] = ()
    """That hold state and don't work, ascending."""
    fractions: dict[int, float]
    """By rank, of weights (where they are sharded) and of optimizer state; of each group they add up to 1."""
    on_host: dict[int, float] = field(default_factory=dict)
    """By rank, the part of its fraction whose optimizer state waits in host memory; ranks without are left out."""
    resident: dict[int, int] = field(default_factory=dict)
    """By working rank, layers that stay whole (the last ones); empty where weights are replicated."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Ranks that own all weights together, where there are several such groups."""
    memory: dict[int, MemoryByKind]
    """By rank, without tokens."""
    tokens: TokenBytes
    traffic: StepTraffic
    update_seconds: float
    checkpointing: bool = False
    """Whether backward repeats the forward."""
    inputs_on_host: bool = False
    """Whether layer inputs wait in host memory."""
    value: float = 0.0
    """Seconds that the ownership program minimises; 0 where there is nothing to choose."""
    bound: float = 0.0
    memory_value: dict[int, float] = field(default_factory=dict)
    """By rank, seconds that one more GB on it (and on its host's other devices) saves."""
    link_value: dict[int, float] = field(default_factory=dict)
    """By host, seconds that one more Gbit/s saves."""

    @property
    def sharded(self) -> bool:
        return self.kind in (SHARDED, GROUPED)

    def expected(self, setting: Setting) -> dict[int, float]:
        """Returns by working rank the tokens of a step that its memory is to hold inputs of."""
        if not self.tokens.per_step:
            return dict.fromkeys(self.ranks, 0.0)
        return setting.expected_tokens(self.ranks)

    def capacity(self, setting: Setting, step_tokens: dict[int, float]) -> dict[int, int]:
        """Returns by working rank the tokens that a pass may have; below 1: it is short.

        step_tokens: by rank, tokens of the step.
        """
        free = {
            r: setting.device_bytes(r) - self.memory[r].total - self.tokens.per_step * step_tokens[r]
            for r in self.ranks
        }
        return {r: int(n // self.tokens.per_pass) if n > 0 else 0 for r, n in free.items()}

    def costs(self, setting: Setting, capacity: Sequence[int]) -> Costs:
        """Returns the costs of the working ranks, numbered from 0 in ascending order."""
        return setting.adjust(
            analytic_costs(
                setting.cluster.subset(self.ranks),
                setting.model,
                checkpointing=self.checkpointing,
                capacity=capacity,
                traffic=self.traffic,
                seconds_per_step=self.update_seconds,
            )
        )
