"""What passes cost on each member's own device, and the cost model that these make for any set of members.

Every member measures its device alone before it joins, so whoever is in the job can be planned for at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from heteromesh.planner.cost.fit import relative
from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.model.attention import ModelAttention


@dataclass(frozen=True, slots=True)
class DeviceCosts:
    """One member's constants of planner/cost/passes.py, as they are on its own device."""

    seconds_per_token2: float
    seconds_per_token: float
    seconds_per_pass: float
    capacity: int
    """Tokens of activations that fit."""

    def seconds(self, lengths: Sequence[int]) -> float:
        """Returns what a pass over these whole sequences takes."""
        pairs, tokens = sum(n * n for n in lengths), sum(lengths)
        return self.seconds_per_token2 * pairs + self.seconds_per_token * tokens + self.seconds_per_pass


class LinkCosts(NamedTuple):
    """What exchanges among members cost."""

    bytes_per_second: float
    seconds_per_round: float


def combine(
    devices: Sequence[DeviceCosts],
    links: LinkCosts | None,
    *,
    typical: Sequence[int],
    methods: Sequence[Method] = (),
    attention: ModelAttention | None = None,
    seconds_per_step: float = 0.0,
) -> Costs:
    """Returns the costs of a job whose members have these devices, in rank order, each on a host of its own.

    Args:
        links: None: not measured; then no pass has several members.
        typical: lengths of a usual pass; devices are as fast as they are on it, relative to the fastest one.
        methods: ways to split a sequence among these members.
    """
    took = [device.seconds(typical) for device in devices]
    reference = devices[took.index(min(took))]
    return Costs(
        seconds_per_token2=reference.seconds_per_token2,
        seconds_per_token=reference.seconds_per_token,
        seconds_per_pass=reference.seconds_per_pass,
        seconds_per_round=links.seconds_per_round if links else 0.0,
        seconds_per_step=seconds_per_step,
        speeds=tuple(relative([min(took)], [seconds]) for seconds in took),
        capacity=tuple(device.capacity for device in devices),
        methods=tuple(methods) if links else (),
        rate=RateByDegree({len(devices): links.bytes_per_second} if links else {}),
        hosts=tuple(range(len(devices))),
        attention=attention,
    )
