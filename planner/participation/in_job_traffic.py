"""What the transfers of a job's sharded weights take in a step: the formulas of planner/ownership/weights.py, counted.

Bytes of a step over the uplink of host h, with W all weights, A_r those that rank r gathers again for the backward (of
the layers that it doesn't keep all but the last), D gradients, f_h what the host's ranks own, H hosts:

    under forward   in   W (1 - f_h) for each of its ranks           out  W f_h for each rank elsewhere
    under backward  in   A_r (1 - f_h) for each of its ranks         out  A_r f_h for each rank r elsewhere
                         + D f_h (H - 1)                                  + D (1 - f_h)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.planner.cost.overlap import RECOMPUTED_FORWARD, StepTraffic
from heteromesh.planner.ownership.in_job import JobModel
from heteromesh.planner.participation.in_job import JobOwnership


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBytes:
    """What goes over a host's uplink in a step, under forward and under backward."""

    forward_in: float
    forward_out: float
    backward_in: float
    backward_out: float


def job_bytes(model: JobModel, ownership: JobOwnership, hosts: Sequence[int]) -> list[HostBytes]:
    """Returns by host the bytes between hosts. hosts: per rank, its host."""
    count, ranks = len(model.layers), range(len(hosts))
    last = count - 1
    sizes = [model.gathered_bytes(i) for i in range(count)]
    gathered = sum(sizes) + model.outside_here
    again = [sum(w for i, w in enumerate(sizes) if i < count - ownership.resident[r] and i != last) for r in ranks]
    found = []
    for host in sorted(set(hosts)):
        own, others = ([r for r in ranks if (hosts[r] == host) is mine] for mine in (True, False))
        inside = sum(ownership.fractions[r] for r in own)
        found.append(
            HostBytes(
                # once a step everything reaches every rank: before it runs, or where it is kept when it is updated
                forward_in=gathered * (1 - inside) * len(own),
                forward_out=gathered * inside * len(others),
                backward_in=sum(again[r] for r in own) * (1 - inside)
                + model.whole_trained * inside * _hosts(hosts, host),
                backward_out=sum(again[r] for r in others) * inside + model.whole_trained * (1 - inside),
            )
        )
    return found


def job_traffic(
    model: JobModel, ownership: JobOwnership, hosts: Sequence[int], uplinks: Sequence[float]
) -> StepTraffic:
    """Returns the seconds of the busiest uplink. uplinks: per host, bytes per second each way to the others."""
    moved = job_bytes(model, ownership, hosts)
    if len(moved) < 2:
        return StepTraffic()
    return StepTraffic(
        gather_seconds=max(max(b.forward_in, b.forward_out) / rate for b, rate in zip(moved, uplinks, strict=True)),
        reduce_seconds=max(max(b.backward_in, b.backward_out) / rate for b, rate in zip(moved, uplinks, strict=True)),
        chunks=max(1, len(model.layers)),
        forward_share=RECOMPUTED_FORWARD,
        layer_major=True,
    )


def _hosts(hosts: Sequence[int], own: int) -> int:
    """Returns how many other hosts send their sums."""
    return len(set(hosts) - {own})
