"""What a pipeline stage can be made of: so many hosts of each kind, each of them whole, in replicas of t ranks.

For one number of pipelines (replicas of a stage) all that a stage then costs per layer is known beforehand, so the
integer program only chooses among compositions and counts layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from heteromesh.planner.ownership.weights import ADAM_BYTES
from heteromesh.planner.stages.hosts import HostResources, sum_seconds_per_byte
from heteromesh.planner.stages.workload import Workload

REPLICATED_BYTES, SHARDED_BYTES = 4, 12
"""Per parameter of a stage: 16-bit weights and gradients on every rank; fp32 weights and moments over its replicas."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Hosts of one stage. Seconds per layer are of one micro-batch, forward and backward."""

    counts: tuple[int, ...]
    """Per kind of host."""
    hosts: tuple[HostResources, ...]
    tensor_parallel: int
    work: Workload
    uplink: float

    @cached_property
    def replica_speeds(self) -> tuple[float, ...]:
        """The speed of every replica: its slowest rank's."""
        t = self.tensor_parallel
        return tuple(h.speeds[i + t - 1] for h in self.hosts for i in range(0, len(h.speeds), t))

    @property
    def even(self) -> bool:
        """Whether all replicas are equally fast."""
        return len(set(self.replica_speeds)) == 1

    @property
    def domain(self) -> str | None:
        """The fabric that all its hosts are on (empty: all on none); None where it spans several."""
        names = {host.fabric for host in self.hosts}
        return names.pop() if len(names) == 1 else None

    @cached_property
    def seconds_per_layer(self) -> float:
        """The fastest replica's."""
        return self.layer_seconds(max(self.replica_speeds))

    @cached_property
    def shared_seconds_per_layer(self) -> float:
        """Mean over micro-batches that are dealt out so that all replicas end together."""
        return len(self.replica_speeds) / sum(1 / self.layer_seconds(v) for v in self.replica_speeds)

    @property
    def head_seconds(self) -> float:
        """The fastest replica's."""
        return self.work.head_seconds / max(self.replica_speeds) / self.tensor_parallel

    @property
    def head_ratio(self) -> float:
        """The slowest replica's seconds over the fastest's."""
        return max(self.replica_speeds) / min(self.replica_speeds)

    def layer_seconds(self, speed: float) -> float:
        """Returns the seconds of a layer in a replica of this speed."""
        t = self.tensor_parallel
        # an all-reduce after attention and one after the MLP, forward and backward
        moved = 4 * 2 * (t - 1) / t * self.work.boundary_bytes / min(host.link for host in self.hosts)
        return self.work.layer_seconds / speed / t + moved

    def transfer_seconds(self, ethernet: bool) -> float:
        """Returns the seconds of one micro-batch of every replica in or out of the stage, all at once."""
        return max(
            len(h.speeds) // self.tensor_parallel * self.work.boundary_bytes / (h.ethernet if ethernet else h.rdma)
            for h in self.hosts
        )

    @cached_property
    def sum_seconds(self) -> float:
        """The gradient sum over the replicas, per parameter."""
        if len(self.replica_speeds) == 1:
            return 0.0
        return self.work.gradient_bytes * sum_seconds_per_byte(self.hosts, self.tensor_parallel, self.uplink)

    @cached_property
    def update_seconds(self) -> float:
        """The optimizer's update, per parameter: its states are sharded over the replicas."""
        shards = len(self.replica_speeds) * self.tensor_parallel
        return ADAM_BYTES / shards / min(host.memory_rate for host in self.hosts)

    @property
    def state_bytes(self) -> float:
        """Weights, gradients and optimizer state of a rank, per parameter of the stage."""
        return (REPLICATED_BYTES + SHARDED_BYTES / len(self.replica_speeds)) / self.tensor_parallel

    def memory_bytes(self, layers: int, in_flight: int, *, first: bool, last: bool) -> float:
        """Returns the bytes of a rank: states, and activations of so many micro-batches."""
        states = self.work.stage_parameters(layers, first=first, last=last) * self.state_bytes
        held = layers * in_flight * self.work.layer_activation_bytes + last * self.work.head_activation_bytes
        return states + held / self.tensor_parallel

    def most_layers(self, in_flight: int, *, first: bool, last: bool) -> int:
        """Returns layers that fit the smallest device with so many micro-batches in flight; negative: not even the ends
        do.
        """
        none = self.memory_bytes(0, in_flight, first=first, last=last)
        layer = self.memory_bytes(1, in_flight, first=first, last=last) - none
        return math.floor((min(host.memory for host in self.hosts) - none) / layer + 1e-9)


def compositions(
    kinds: Sequence[tuple[HostResources, int]],
    pipelines: int,
    work: Workload,
    degrees: Sequence[int],
    uplink: float,
    *,
    one_fabric: bool,
) -> Iterator[Composition]:
    """Yields every composition with so many replicas, over the tensor-parallel degrees that divide its hosts' devices.

    kinds: (host, how many there are); one_fabric: only hosts of the same fabric together.
    """
    fabrics = dict.fromkeys(site.fabric for site, _ in kinds)
    rank_sets = [{fabric} for fabric in fabrics] if one_fabric else [set(fabrics)]
    for t, fabric_set in product(degrees, rank_sets):
        usable = [i for i, (site, _) in enumerate(kinds) if site.fabric in fabric_set and len(site.speeds) % t == 0]
        for counts in _counts(kinds, usable, pipelines * t):
            hosts = tuple(kinds[i][0] for i in usable for _ in range(counts[i]))
            yield Composition(counts=counts, hosts=hosts, tensor_parallel=t, work=work, uplink=uplink)


def _counts(kinds: Sequence[tuple[HostResources, int]], usable: Sequence[int], ranks: int) -> Iterator[tuple[int, ...]]:
    """Yields hosts of each kind that have exactly so many ranks together."""
    chosen = [0] * len(kinds)
    sizes = [len(kinds[i][0].speeds) for i in usable]
    rest = [sum(n * kinds[i][1] for n, i in zip(sizes[p:], usable[p:], strict=True)) for p in range(len(usable))]
    steps = [math.gcd(*sizes[p:]) for p in range(len(usable))]

    def fill(place: int, left: int) -> Iterator[tuple[int, ...]]:
        if not left:
            yield tuple(chosen)
            return
        if place == len(usable) or left > rest[place] or left % steps[place]:
            return
        kind = usable[place]
        for n in range(min(kinds[kind][1], left // sizes[place]), -1, -1):
            chosen[kind] = n
            yield from fill(place + 1, left - n * sizes[place])
        chosen[kind] = 0

    return fill(0, ranks)
