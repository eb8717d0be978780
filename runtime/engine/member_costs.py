"""What passes cost in a job of changing members: each measures its own device, links are measured once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from heteromesh.comm.world import World
from heteromesh.planner.cluster.cluster import Cluster, local_cluster
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.devices import DeviceCosts, LinkCosts, combine
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.constants import load_constants
from heteromesh.planner.reduction.nics import nic_rates, over_all_nics, over_one_nic, several_nics
from heteromesh.planner.reduction.reduction import Reduction
from heteromesh.runtime.engine.calibrate import Calibration
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader


class MemberCosts:
    """The costs of any set of members, from what each has told of its device, a cluster file and a cost file."""

    def __init__(
        self,
        executor: StepExecutor,
        reader: Reader,
        *,
        place: int | None,
        nics: int,
        ranks: int,
        tokens_per_device: int | None,
        cluster: Cluster | None,
        cost_file: Path | None,
    ) -> None:
        """Measures this rank's device, unless a cost file says what passes cost.

        `place`: which rank of the whole job, of at most `ranks`, this one is, where that is known. `nics`: how many of
        its host's it uses. `cluster`: of the job's hosts when all are there, where a file describes them.
        """
        self._executor, self._cluster, self._capacity = executor, cluster, tokens_per_device
        self._constants = load_constants(cost_file) if cost_file is not None else None
        self._sample, self._longest = reader.sample_input, max(reader.lengths)
        self._typical = [int(statistics.median(reader.lengths))]
        calibration = Calibration(executor, self._sample, self._longest)
        self._shape = calibration.attention_shape()
        self._here, self._ranks = (place, nics), ranks
        self.device: DeviceCosts | None = None
        """This rank's."""
        if self._constants is None:
            costs = self._measured = calibration.measure(tokens_per_device)
            self.device = DeviceCosts(
                costs.seconds_per_token2, costs.seconds_per_token, costs.seconds_per_pass, costs.capacity[0]
            )
        self._devices: dict[int, DeviceCosts] = {}
        self._places: dict[int, int | None] = {}
        self._nics: dict[int, int] = {}
        self.links: LinkCosts | None = None

    @property
    def links_wanted(self) -> bool:
        """Whether exchanges are to be measured."""
        return self._constants is None

    def meet(self, world: World) -> None:
        """Has all members tell each other which ranks of the whole job they are, their NICs and devices' costs."""
        told = world.gather((*self._here, self.device))
        for member, (place, nics, device) in zip(world.members, told, strict=True):
            self._places[member], self._nics[member] = place, nics
            if device is not None:
                self._devices[member] = device

    def measure_links(self, world: World) -> LinkCosts:
        """Measures what exchanges cost; all ranks of the world together."""
        self._executor.world = world
        calibration = Calibration(self._executor, self._sample, self._longest)
        return LinkCosts(calibration.exchange_rate(), calibration.round_seconds())

    def cluster_of(self, members: Sequence[int]) -> Cluster | None:
        """Returns the cluster of these members, where a file describes it; ranks are in the order of its ranks."""
        if self._cluster is None:
            return None
        return self._cluster.subset([place for m in members if (place := self._places[m]) is not None])

    def reduction_of(self, members: Sequence[int]) -> Reduction | None:
        """Returns how these members' gradients are summed best, where a cluster file describes their links.

        Over all Ethernet NICs of the hosts where the members use them all.
        """
        cluster = self.cluster_of(members)
        if cluster is None or cluster.ranks == 1:
            return None
        counts = [len(rates) for rates in nic_rates(cluster)]
        used = (self._nics[m] >= counts[host] for m, host in zip(members, cluster.rank_hosts, strict=True))
        return over_all_nics(cluster) if several_nics(cluster) and all(used) else over_one_nic(cluster)

    def complete(self, members: Sequence[int]) -> bool:
        """Whether these are all ranks that the job can have, in the order of the cluster."""
        return [self._places[m] for m in members] == list(range(self._ranks))

    def of(self, members: tuple[int, ...]) -> Costs:
        """Returns the costs, not corrected, of a job of these members, in rank order."""
        cluster = self.cluster_of(members)
        if self._constants is not None:
            costs = bind(self._constants, cluster or local_cluster(len(members)))
        else:
            hosts = cluster.rank_hosts if cluster is not None else range(len(members))
            costs = combine(
                [self._devices[m] for m in members],
                self.links,
                typical=self._typical,
                methods=self._shape.methods(self._executor.forwards, hosts) if self._shape else (),
                attention=self._measured.attention,
            )
            if cluster is not None and self.links is not None:
                costs = replace(costs, hosts=cluster.rank_hosts, rate=cluster_links(cluster))
        return replace(costs, capacity=(self._capacity,) * len(members)) if self._capacity is not None else costs

    def speeds(self, members: tuple[int, ...]) -> tuple[float, ...]:
        """Returns how fast these members are, relative to the fastest."""
        return self.of(members).speeds

    def owned(self, members: tuple[int, ...]) -> tuple[float, ...]:
        """Returns by rank the shares of a tensor that these members sum: as the cluster file's links want, or equal."""
        reduction = self.reduction_of(members)
        return (1.0,) * len(members) if reduction is None else reduction.fractions
