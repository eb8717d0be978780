"""What a placement takes, exactly as the simulator would run it: seconds, bytes between fabrics, memory per rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul

from heteromesh.errors import UserError
from heteromesh.planner.cluster.links import one_fabric
from heteromesh.planner.stages.compositions import Composition
from heteromesh.planner.stages.hosts import LATENCY_SECONDS, ClusterResources, HostResources
from heteromesh.planner.stages.one_f_one_b import Timeline, run_1f1b
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.planner.stages.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One step of a placement."""

    seconds: float
    pipeline_seconds: float
    """The end of the last backward anywhere; the rest of `seconds` is exposed gradient sum and optimizer."""
    busy_share: float
    """The share of the ranks' time in which they compute; the rest is bubble, transfers, gradient sum and optimizer."""
    sum_seconds: tuple[float, ...]
    """Per stage, of its gradient sum, hidden or not."""
    activation_bytes: float
    """Between fabrics per step, both ways together: micro-batches at the cuts."""
    gradient_bytes: float
    """Between fabrics per step, both ways together: gradient sums of stages that span fabrics."""
    memory_bytes: tuple[int, ...]
    """Per rank of the cluster."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A placement with the seconds of its parts."""

    placement: Placement
    parts: tuple[Composition, ...]
    """Per stage, its hosts."""
    stage_seconds: tuple[tuple[float, ...], ...]
    """[pipeline][stage]: forward and backward of a micro-batch."""
    transfers: tuple[float, ...]
    """Between stages i and i + 1, one way, with all pipelines at it at once."""

    def timelines(self) -> tuple[Timeline, ...]:
        """Returns a timeline a pipeline; equal ones are one object."""
        known: dict[object, Timeline] = {}
        listed = []
        for seconds, count in zip(self.stage_seconds, self.placement.micro_batches, strict=True):
            key = (seconds, count)
            if key not in known:
                known[key] = run_1f1b(seconds, self.transfers, count, LATENCY_SECONDS)
            listed.append(known[key])
        return tuple(listed)

    def sums(self, timelines: Sequence[Timeline]) -> tuple[tuple[float, float, float], ...]:
        """Returns by stage (start of the gradient sum, its end, end of the optimizer), seconds from the start of the
        step.

        A layer's gradients are summed while the last micro-batch's backward goes on with the layers before it.
        """
        spans = []
        for s, (stage, part) in enumerate(zip(self.placement.stages, self.parts, strict=True)):
            parameters = self.parameters(s)
            seconds = parameters * part.sum_seconds
            last = [t.compute[s][-1] for t in timelines]
            start = max(w.start + (w.end - w.start) / stage.layers for w in last)
            end = max(w.end for w in last)
            if seconds:
                end = max(end + seconds / stage.layers, start + seconds)
            spans.append((start, end, end + parameters * part.update_seconds))
        return tuple(spans)

    def parameters(self, stage: int) -> int:
        """Counts the parameters of a stage."""
        stages = self.placement.stages
        work = self.parts[stage].work
        return work.stage_parameters(stages[stage].layers, first=stage == 0, last=stage == len(stages) - 1)


def set_up(placement: Placement, resources: ClusterResources, work: Workload) -> Setup:
    """Returns the seconds of a placement's parts. Raises UserError where it doesn't fit the hosts or the model."""
    if placement.layers != work.layers:
        raise UserError(f"the stages have {placement.layers} layers and the model {work.layers}: make the plan again")
    if sum(placement.micro_batches) != work.micro_batches:
        raise UserError(
            f"the pipelines run {sum(placement.micro_batches)} micro-batches and the batch has {work.micro_batches}: "
            "make the plan again"
        )
    parts = tuple(composition_of(stage, resources, work) for stage in placement.stages)
    homes = {rank: host for host in resources.hosts for rank in host.ranks}
    speeds = {rank: v for host in resources.hosts for rank, v in zip(host.ranks, host.speeds, strict=True)}
    seconds = []
    for pipeline in placement.pipelines:
        own = []
        for s, ranks in enumerate(pipeline):
            head = work.head_seconds if s == len(pipeline) - 1 else 0.0
            slowest = min(speeds[r] for r in ranks)
            own.append(placement.stages[s].layers * parts[s].layer_seconds(slowest) + head / slowest / len(ranks))
        seconds.append(tuple(own))
    cuts = [
        [(homes[a[0]], homes[b[0]]) for a, b in zip(one.replicas, other.replicas, strict=True)]
        for one, other in pairwise(placement.stages)
    ]
    transfers = tuple(_transfer(cut, work, resources.uplink) for cut in cuts)
    return Setup(placement=placement, parts=parts, stage_seconds=tuple(seconds), transfers=transfers)


def predict(placement: Placement, resources: ClusterResources, work: Workload) -> Prediction:
    """Predicts one step. Raises UserError as `set_up`, and where a stage does not fit its devices."""
    setup = set_up(placement, resources, work)
    memory = _memory(setup, resources)
    timelines = setup.timelines()
    sums = setup.sums(timelines)
    seconds = max(end for _, _, end in sums)
    pipelines = zip(setup.stage_seconds, placement.micro_batches, strict=True)
    widths = [stage.tensor_parallel for stage in placement.stages]
    busy = sum(n * sum(map(mul, own, widths)) for own, n in pipelines)
    return Prediction(
        seconds=seconds,
        pipeline_seconds=max(max(t.ends) for t in timelines),
        busy_share=busy / seconds / sum(len(stage.ranks) for stage in placement.stages),
        sum_seconds=tuple(setup.parameters(s) * part.sum_seconds for s, part in enumerate(setup.parts)),
        activation_bytes=_activation_bytes(setup, resources),
        gradient_bytes=sum(
            2 * (len({h.fabric for h in part.hosts}) - 1) * setup.parameters(s) * work.gradient_bytes
            for s, part in enumerate(setup.parts)
        ),
        memory_bytes=memory,
    )


def deal(total: int, seconds: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Deals micro-batches to every pipeline, at least one, so that they end together. seconds: [pipeline][stage]."""
    counts = [1] * len(seconds)
    cycles, fills = [max(own) for own in seconds], [sum(own) for own in seconds]
    for _ in range(total - len(counts)):
        best = min(range(len(counts)), key=lambda j: (counts[j] * cycles[j] + fills[j], j))
        counts[best] += 1
    return tuple(counts)


def composition_of(stage: Stage, resources: ClusterResources, work: Workload) -> Composition:
    """Returns the hosts of a stage. Raises UserError for parts of hosts and replicas that span hosts."""
    members = set(stage.ranks)
    hosts = tuple(host for host in resources.hosts if members.intersection(host.ranks))
    if sum(len(host.ranks) for host in hosts) != len(members) or not all(members.issuperset(h.ranks) for h in hosts):
        raise UserError(f"the stage on ranks {sorted(members)} is not made of whole hosts: make the plan again")
    if any(not any(set(replica) <= set(h.ranks) for h in hosts) for replica in stage.replicas):
        raise UserError(
            f"tensor_parallel {stage.tensor_parallel} of the stage on ranks {sorted(members)} spans hosts: "
            "make the plan again"
        )
    return Composition(
        counts=(), hosts=hosts, tensor_parallel=stage.tensor_parallel, work=work, uplink=resources.uplink
    )


def uses_rdma(a: HostResources, b: HostResources) -> bool:
    """Returns whether two hosts reach each other by RDMA."""
    return one_fabric((a.fabric, b.fabric))


def _transfer(cut: Sequence[tuple[HostResources, HostResources]], work: Workload, uplink: float) -> float:
    """Hands one micro-batch of every pipeline over a cut, all at once: the busiest NIC decides."""
    out, into = Counter[tuple[HostResources, bool]](), Counter[tuple[HostResources, bool]]()
    for a, b in cut:
        out[a, uses_rdma(a, b)] += 1
        into[b, uses_rdma(a, b)] += 1
    busiest = max(
        count * work.boundary_bytes / (site.rdma if rdma else site.ethernet)
        for side in (out, into)
        for (site, rdma), count in side.items()
    )
    crossing = sum(a.fabric != b.fabric for a, b in cut)
    return max(busiest, crossing * work.boundary_bytes / uplink)


def _activation_bytes(setup: Setup, resources: ClusterResources) -> float:
    fabric = {rank: host.fabric for host in resources.hosts for rank in host.ranks}
    crossings = 0
    for pipeline, count in zip(setup.placement.pipelines, setup.placement.micro_batches, strict=True):
        crossings += count * sum(fabric[a[0]] != fabric[b[0]] for a, b in pairwise(pipeline))
    return 2 * crossings * setup.parts[0].work.boundary_bytes


def _memory(setup: Setup, resources: ClusterResources) -> tuple[int, ...]:
    placement, stages = setup.placement, len(setup.placement.stages)
    held = dict.fromkeys((r for host in resources.hosts for r in host.ranks), 0)
    for s, (stage, part) in enumerate(zip(placement.stages, setup.parts, strict=True)):
        most = max(placement.in_flight(s, j) for j in range(len(placement.micro_batches)))
        need = part.memory_bytes(stage.layers, most, first=s == 0, last=s == stages - 1)
        for host in part.hosts:
            if need > host.memory:
                raise UserError(
                    f"stage {s} needs {need / 1e9:.1f} GB on rank {host.ranks[0]} and {host.memory / 1e9:.1f} GB can "
                    "be used: give the stage fewer layers or smaller micro-batches"
                )
        held.update((r, round(need)) for r in stage.ranks)
    return tuple(held[r] for r in sorted(held))
