"""Plays a step of a placement: 1F1B in every pipeline, transfers at the cuts, gradient sums at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from heteromesh.planner.report.simulate import SimulatedEvent
from heteromesh.planner.stages.hosts import ClusterResources, HostResources
from heteromesh.planner.stages.predict import set_up
from heteromesh.planner.stages.stages import Placement
from heteromesh.planner.stages.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRun:
    """One simulated step of a placement."""

    seconds: float
    busy: tuple[float, ...]
    """Per rank, seconds of compute."""
    wait: tuple[float, ...]
    """Per rank, seconds of the step in which it computes nothing: bubble, transfers, exposed sum, optimizer."""
    bubble: float
    """Share of the ranks' time up to the end of the last backward in which they compute nothing."""
    hidden_sum: float
    """Share of the gradient sums' seconds that backward hides (1 where there is nothing to sum)."""
    events: tuple[SimulatedEvent, ...] = field(repr=False)


def simulate_placement(
    placement: Placement, resources: ClusterResources, work: Workload, slow: Mapping[int, float] | None = None
) -> PlacementRun:
    """slow: by rank, its compute takes this many times as long. Raises UserError as `planner.predict.set_up`."""
    setup = set_up(placement, _slowed(resources, slow or {}), work)
    timelines = setup.timelines()
    sums = setup.sums(timelines)
    ranks = sum(len(stage.ranks) for stage in placement.stages)
    busy, events = dict.fromkeys((r for stage in placement.stages for r in stage.ranks), 0.0), []
    for pipeline, timeline in zip(placement.pipelines, timelines, strict=True):
        for s, works in enumerate(timeline.compute):
            for rank in pipeline[s]:
                for w in works:
                    events.append(
                        SimulatedEvent(rank, f"{w.kind} {w.micro_batch}", "pass", w.start, w.end - w.start, 0)
                    )
                busy[rank] += sum(w.end - w.start for w in works)
        for move in timeline.transfers:
            for rank in pipeline[move.stage]:
                name = f"send {move.kind} {move.micro_batch}"
                events.append(SimulatedEvent(rank, name, "comm", move.start, move.end - move.start, 0))
    for stage, (start, end, after) in zip(placement.stages, sums, strict=True):
        for rank in stage.ranks:
            if len(placement.micro_batches) > 1:
                events.append(SimulatedEvent(rank, "gradient sum", "comm", start, end - start, 0))
            events.append(SimulatedEvent(rank, "optimizer", "optimizer", end, after - end, 0))
    seconds, last = max(after for _, _, after in sums), max(max(t.ends) for t in timelines)
    exposed = sum(max(0.0, end - max(t.ends[s] for t in timelines)) for s, (_, end, _) in enumerate(sums))
    summed = sum(setup.parameters(s) * part.sum_seconds for s, part in enumerate(setup.parts))
    return PlacementRun(
        seconds=seconds,
        busy=tuple(busy[r] for r in sorted(busy)),
        wait=tuple(seconds - busy[r] for r in sorted(busy)),
        bubble=1 - sum(busy.values()) / ranks / last,
        hidden_sum=1 - exposed / summed if summed else 1.0,
        events=tuple(sorted(events, key=lambda e: (e.rank, e.start))),
    )


def _slowed(resources: ClusterResources, slow: Mapping[int, float]) -> ClusterResources:
    def host(site: HostResources) -> HostResources:
        speeds = tuple(v / slow.get(rank, 1.0) for rank, v in zip(site.ranks, site.speeds, strict=True))
        return replace(site, speeds=speeds)

    return replace(resources, hosts=tuple(map(host, resources.hosts)))
